"""One generation, measured: frames, seconds of every step, density of every step and layer."""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.pipelines import embedded
from dit_accel.pipelines.families import family_of, models_of
from dit_accel.pipelines.plug import EMBEDDED, session_of
from dit_accel.pipelines.wan import FAMILY
from dit_accel.recorder import Stamp, Watch


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate. ``None`` leaves a number to the model.

    Attributes:
        prompt, negative_prompt: texts.
        height, width: pixels.
        frames: of the clip.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 turns it off.
        seed: of the noise, drawn on the CPU, so that it is the same on every device.
    """

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated and measured.

    Attributes:
        frames: fp32 ``[T, 3, H, W]`` in [0, 1], on the CPU.
        seconds: of the whole call.
        step_seconds: of every denoising step, guidance included.
        decode_seconds: from the last step to the frames.
        density: exact pairs over all pairs of self-attention, measured; ``None`` where no processor
            of ours ran.
        by_step, by_layer: the same in parts.
        latents: the final ones, fp32 on the CPU, without the batch's dimension.
        step_latents: those after every step, if they were asked for.
        by_cell: density of every step, layer by layer.
    """

    frames: Tensor
    seconds: float
    step_seconds: tuple[float, ...]
    decode_seconds: float
    density: float | None
    by_step: dict[int, float]
    by_layer: dict[int, float]
    latents: Tensor
    step_latents: tuple[Tensor, ...] = ()
    by_cell: dict[int, dict[int, float]] = field(default_factory=dict)


_NAMES = {
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}


def effective(pipe: Any, request: Request) -> Request:
    """The request with the model's own numbers where none were given, all checked.

    Raises:
        InputError: a number does not fit the model.
    """
    transformer = next(iter(models_of(pipe).values()))
    if family_of(transformer) is not FAMILY:
        raise InputError(
            f"generate: expected a pipeline of {FAMILY.name}, got a {type(pipe).__name__}, which "
            "can be accelerated and called from Python"
        )
    name = getattr(transformer, EMBEDDED, None)
    suggested = embedded.defaults(name) if name else {}
    parameters = inspect.signature(type(pipe).__call__).parameters
    missing = {
        mine: suggested.get(theirs, parameters[theirs].default)
        for mine, theirs in _NAMES.items()
        if getattr(request, mine) is None
    }
    full = replace(request, **missing)
    _check(pipe, full)
    return full


def _check(pipe: Any, request: Request) -> None:
    for name in ("height", "width", "frames", "steps"):
        value = getattr(request, name)
        if value < 1:
            raise InputError(f"{name}: expected a positive integer, got {value}")
    guidance = request.guidance
    assert guidance is not None
    if not (math.isfinite(guidance) and guidance >= 0):
        raise InputError(f"guidance: expected a number, 0 or more, got {guidance}")
    if not 0 <= request.seed < 2**63:
        raise InputError(f"seed: expected an integer from 0 to 2^63 - 1, got {request.seed}")
    if not request.prompt.strip():
        raise InputError("prompt: expected some words, got none")
    transformer = next(iter(models_of(pipe).values()))
    _, patch, _ = transformer.config.patch_size
    # diffusers asks for multiples of 16 whatever the model
    unit = math.lcm(16, pipe.vae_scale_factor_spatial * patch)
    for name in ("height", "width"):
        if getattr(request, name) % unit:
            raise InputError(f"{name}: expected a multiple of {unit}, got {getattr(request, name)}")
    unit = pipe.vae_scale_factor_temporal
    assert request.frames is not None
    if (request.frames - 1) % unit:
        raise InputError(
            f"frames: expected one more than a multiple of {unit}, got {request.frames}"
        )


@torch.inference_mode()
def generate(
    pipe: Any,
    request: Request,
    on_step: Callable[[int, int], None] | None = None,
    *,
    keep_latents: bool = False,
    on_latents: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Generation:
    """Run a pipeline once.

    Args:
        pipe: from `load`, with whatever processors it has.
        request: what to generate.
        on_step: called after every step with how many are done, and of how many.
        keep_latents: also keep the latents after every step.
        on_latents: called after every step with its number, from 0, and the latents it made; what
            it returns takes their place, unless that is ``None``.

    Raises:
        InputError: the request does not fit the model.
    """
    request = effective(pipe, request)
    # where it computes, which offloading keeps apart from where it lies
    watch = Watch(pipe._execution_device)
    marks: list[Stamp] = []
    latents: list[Tensor] = []

    def begin(*_: Any) -> None:
        if not marks:
            marks.append(watch.now())

    def end(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        marks.append(watch.now())
        if not keep_latents:
            latents.clear()
        # solvers may write into what they returned
        latents.append(given["latents"][0].float().clone())
        if on_step is not None:
            on_step(step + 1, request.steps or 0)
        if on_latents is not None:
            changed = on_latents(step, given["latents"])
            if changed is not None:
                given["latents"] = changed
        return given

    handles = [model.register_forward_pre_hook(begin) for model in models_of(pipe).values()]
    watch.wait()
    start = time.perf_counter()
    try:
        frames = pipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="pt",
            callback_on_step_end=end,
            **{theirs: getattr(request, mine) for mine, theirs in _NAMES.items()},
        ).frames[0]
        finished = watch.now()
        watch.wait()
        stop = time.perf_counter()
    finally:
        for handle in handles:
            handle.remove()
    log = session_of(pipe).log
    return Generation(
        frames.float().cpu(),
        stop - start,
        tuple(itertools.starmap(watch.seconds, itertools.pairwise(marks))),
        watch.seconds(marks[-1], finished),
        log.density,
        log.by_step,
        log.by_layer,
        latents[-1].cpu(),
        tuple(one.cpu() for one in latents) if keep_latents else (),
        log.by_cell,
    )
