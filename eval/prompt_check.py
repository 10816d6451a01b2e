"""Does a generated clip show what its prompt says? Dense attention beside sparse methods.

The prompts are those of the embedded model's evaluation, every one a combination of colour, shape
and motion that was held out of its training. The judge is :mod:`dit_accel.eval.checker`. Prompt
``i`` is generated from seed ``seed + i`` by every method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from dit_accel import presets
from dit_accel.errors import InputError
from dit_accel.eval import checker
from dit_accel.eval.metrics.fidelity import psnr
from dit_accel.method import Method
from dit_accel.pipelines import accelerate, embedded, load, restore, session_of
from dit_accel.pipelines.tiny_wan import scenes


@dataclass(frozen=True, slots=True)
class Clip:
    """One generated clip.

    Attributes:
        prompt, seed: what it was made from.
        found: what the judge saw: colour, shape and motion, ``None`` where nothing was seen.
        right: per attribute, whether it is what the prompt asked for.
        psnr: of all frames to the dense clip of the same seed, in dB; ``None`` for dense itself.
    """

    prompt: str
    seed: int
    found: dict[str, str | None]
    right: dict[str, bool]
    psnr: float | None


@dataclass(frozen=True, slots=True)
class MethodCheck:
    """What was measured of one method.

    Attributes:
        method, options: the preset and its effective options.
        density: measured over the attention of all clips.
        shares: of clips in which colour, shape and motion are right, and ``all`` of them.
        psnr: mean over the clips of `Clip.psnr`; ``None`` for dense.
        seconds: for all clips, autoencoder and text encoder included.
        clips: one by one.
    """

    method: str
    options: dict[str, str]
    density: float
    shares: dict[str, float]
    psnr: float | None
    seconds: float
    clips: tuple[Clip, ...]


@dataclass(frozen=True, slots=True)
class PromptCheck:
    """The whole measurement; ``settings`` are enough to repeat it."""

    settings: dict[str, Any]
    methods: tuple[MethodCheck, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


@torch.inference_mode()
def run(
    methods: Mapping[str, Method] | None = None,
    *,
    model: str = "tiny-wan",
    prompts: int = 64,
    batch: int = 8,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    keep: Callable[[str, int, Tensor], None] | None = None,
) -> PromptCheck:
    """Generate the evaluation prompts densely and by every method, and judge them.

    Args:
        methods: by name; PISA with the options that the model suggests if not given. Dense always
            comes first.
        model: an embedded model.
        prompts: how many, from the first.
        batch: clips generated at once.
        steps, guidance: of the generation; the model's own by default.
        seed: of the first prompt.
        device, dtype: as in `dit_accel.pipelines.load`.
        progress: called with the method's name, how many clips are done, and of how many.
        keep: called with the method's name, the prompt's number and its frames ``[T, 3, H, W]``.

    Raises:
        InputError: an argument does not fit.
    """
    for name, value in (("prompts", prompts), ("batch", batch), ("steps", steps or 1)):
        if value < 1:
            raise InputError(f"{name}: expected a positive integer, got {value}")
    chosen = dict(methods or {})
    if methods is None:
        chosen["pisa"] = presets.build("pisa", **embedded.options_for(model, "pisa", {}))
    chosen = {"dense": presets.dense(), **chosen}
    call = embedded.defaults(model)
    call.update({"num_inference_steps": steps or call["num_inference_steps"]})
    call.update({"guidance_scale": call["guidance_scale"] if guidance is None else guidance})
    pipe = load(model, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    wanted = scenes.evaluation_scenes(prompts)
    settings = {
        "model": model,
        "prompts": prompts,
        "seed": seed,
        "batch": batch,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        **call,
    }
    dense: list[Tensor] = []
    checks: list[MethodCheck] = []
    for name, method in chosen.items():
        accelerate(pipe, method)

        def done(count: int, name: str = name) -> None:
            if progress is not None:
                progress(name, count, prompts)

        frames, density, seconds = _generate(
            pipe,
            [scene.caption() for scene in wanted],
            seed,
            batch,
            call,
            done,
        )
        if not checks:
            dense = frames
        clips = tuple(
            _judge(scene, seed + i, clip, None if not checks else dense[i])
            for i, (scene, clip) in enumerate(zip(wanted, frames, strict=True))
        )
        for i, clip in enumerate(frames):
            if keep is not None:
                keep(name, i, clip)
        checks.append(_summed(name, method, density, seconds, clips))
    restore(pipe)
    return PromptCheck(settings, tuple(checks))


def _generate(
    pipe: Any,
    prompts: Sequence[str],
    seed: int,
    batch: int,
    call: Mapping[str, Any],
    done: Callable[[int], None],
) -> tuple[list[Tensor], float, float]:
    """Frames ``[T, 3, H, W]`` of every prompt on the CPU, the density, and the seconds it took."""
    frames: list[Tensor] = []
    exact = every = 0.0
    start = time.perf_counter()
    for first in range(0, len(prompts), batch):
        some = list(prompts[first : first + batch])
        seeds = [torch.Generator().manual_seed(seed + first + i) for i in range(len(some))]
        made = pipe(prompt=some, generator=seeds, output_type="pt", **call).frames
        frames += list(made.float().cpu())
        for record in session_of(pipe).log.records:
            exact += float(record.exact)
            every += float(record.every)
        done(len(frames))
    return frames, exact / every, time.perf_counter() - start


def _judge(scene: scenes.Scene, seed: int, clip: Tensor, dense: Tensor | None) -> Clip:
    found = checker.inspect(clip)
    ratio = None if dense is None else psnr(clip, dense)
    seen = {name: getattr(found, name) for name in checker.ATTRIBUTES}
    return Clip(scene.caption(), seed, seen, found.agrees(scene), ratio)


def _summed(
    name: str, method: Method, density: float, seconds: float, clips: tuple[Clip, ...]
) -> MethodCheck:
    count = len(clips)
    shares = {key: sum(clip.right[key] for clip in clips) / count for key in checker.ATTRIBUTES}
    shares["all"] = sum(all(clip.right.values()) for clip in clips) / count
    ratios = [clip.psnr for clip in clips if clip.psnr is not None]
    return MethodCheck(
        name,
        {key: str(value) for key, value in method.options.items()},
        density,
        shares,
        sum(ratios) / len(ratios) if ratios else None,
        seconds,
        clips,
    )


def render(result: PromptCheck) -> Table:
    """The result as a table."""
    told = result.settings
    table = Table(
        title=f"{told['model']}: {told['prompts']} prompts of held-out combinations, "
        f"{told['num_inference_steps']} steps, guidance {told['guidance_scale']}"
    )
    for heading in ("method", "density", *checker.ATTRIBUTES, "all", "PSNR to dense", "s / clip"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for check in result.methods:
        table.add_row(
            check.method,
            f"{check.density:.3f}",
            *(f"{check.shares[key]:.1%}" for key in (*checker.ATTRIBUTES, "all")),
            "" if check.psnr is None else f"{check.psnr:.1f} dB",
            f"{check.seconds / len(check.clips):.2f}",
        )
    table.caption = f"{told['device']}, {told['dtype']}, torch {told['torch']}"
    return table
