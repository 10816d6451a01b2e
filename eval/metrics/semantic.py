"""Whether a clip of the embedded domain shows what its prompt says, by the analytic checker."""

from __future__ import annotations

from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.eval import checker
from dit_accel.eval.prompts import scene_of
from dit_accel.pipelines import embedded

NAMES = (*checker.ATTRIBUTES, "all_three")


def judge(frames: Tensor, text: str) -> dict[str, float] | str:
    """1 or 0 by attribute, or why the clip cannot be judged.

    Args:
        frames: ``[T, 3, H, W]`` in [0, 1].
        text: the prompt.
    """
    scene = scene_of(text)
    if scene is None:
        return f"the checker knows no prompt such as {text!r}"
    try:
        right = checker.inspect(frames).agrees(scene)
    except InputError as error:
        return str(error)
    scores = {name: float(right[name]) for name in checker.ATTRIBUTES}
    return {**scores, "all_three": float(all(right.values()))}


def why_no_relation(model: str) -> str:
    """Why spatial relations are not judged."""
    if embedded.find(model) is None:
        return "the analytic checker is for the embedded domain alone"
    return f"the captions that {model} knows have no word for where two shapes stand"
