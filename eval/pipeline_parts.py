"""Where the time of a transformer's forward goes, by hooks on its modules and the spans of methods.

Every moment of a forward belongs to one part, so that the parts make up the whole. The hooks
themselves cost something, which is why the whole is timed without them, in another pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dit_accel.eval.instrument import DenseSpans, is_dense
from dit_accel.pipelines.families import family_of
from dit_accel.recorder import Recorder, recording

PARTS = ("attention", "routing and layout", "norms and rotary", "linear", "other")
"""What the time is divided into."""
_OF_SPANS = {
    "attend": "attention",
    "merge": "attention",
    "layout": "routing and layout",
    "route": "routing and layout",
    "norm": "norms and rotary",
    "rotary": "norms and rotary",
    "between": "norms and rotary",
    "linear": "linear",
    "other": "other",
}


@contextlib.contextmanager
def divided(model: Any, device: torch.device | str) -> Iterator[Recorder]:
    """Record the forwards of a transformer, stock or accelerated.

    What an attention module does outside of its projections, its norms, its routing and its
    attention is charged to its norms and rotary embedding: rotation, and copies around it.
    """
    family = family_of(model)
    assert family is not None
    own = {id(attn) for attn in family.self_attention(model)}
    # a hook would keep the fused kernel from taking a norm's place; what they cost is charged to
    # the same part without one
    inner = {id(part) for attn in family.self_attention(model) for part in attn.modules()}
    with contextlib.ExitStack() as hooks, recording(device) as recorder:

        def around(module: nn.Module, begin: Callable[..., None], end: Callable[..., None]) -> None:
            before = module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(module.register_forward_hook(end).remove)

        def span(module: nn.Module, name: str) -> None:
            around(module, lambda *_: recorder.begin(name), lambda *_: recorder.end())

        span(model, "other")
        for module in model.modules():
            if hasattr(module, "set_processor"):
                _watch(module, recorder, around, own)
            elif isinstance(module, nn.Linear | nn.Conv3d):
                span(module, "linear")
            elif _is_norm(module) and id(module) not in inner:
                span(module, "norm")
        yield recorder


def _is_norm(module: nn.Module) -> bool:
    """Norms themselves; adaptive ones hold a linear layer, which is charged on its own."""
    name = type(module).__name__
    return name.endswith(("Norm", "NormZero", "NormZeroSingle", "NormContinuous"))


def _watch(attn: Any, recorder: Recorder, around: Callable[..., None], own: set[int]) -> None:
    modes: list[DenseSpans] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.begin("between")
        tokens = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if id(attn) not in own or is_dense(attn, tokens):
            modes.append(DenseSpans(recorder))
            modes[-1].__enter__()

    def end(*_: Any) -> None:
        if modes:
            modes.pop().__exit__(None, None, None)
        recorder.end()

    around(attn, begin, end)


def seconds_by_part(recorder: Recorder) -> dict[str, float]:
    """Seconds of everything that was recorded, by the names of `PARTS`.

    Raises:
        KeyError: a span has a name that belongs to no part.
    """
    found = dict.fromkeys(PARTS, 0.0)
    for name, took in recorder.parts().items():
        found[_OF_SPANS[name]] += took
    return found
