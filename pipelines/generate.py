"""One generation, measured: frames, seconds of every step, density of every step and layer."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.pipelines.families import models_of
from dit_accel.pipelines.plug import session_of
from dit_accel.pipelines.request import Request, call_of, effective, guider_of, kind_of
from dit_accel.recorder import Stamp, Watch


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated and measured.

    Attributes:
        frames: fp32 ``[T, 3, H, W]`` in [0, 1], on the CPU; ``T`` is 1 for an image.
        seconds: of the whole call.
        step_seconds: of every denoising step, guidance included.
        decode_seconds: from the last step to the frames.
        density: exact pairs over all pairs of self-attention, measured; ``None`` where no processor
            of ours ran.
        by_step, by_layer: the same in parts.
        latents: the final ones, fp32 on the CPU, without the batch's dimension.
        step_latents: those after every step, if they were asked for.
        by_cell: density of every step, layer by layer.
        norm_rotary: how many attention calls had their norms and rotary embedding from whom.
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
    norm_rotary: dict[str, int] = field(default_factory=dict)


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

    def end(latent: Tensor) -> Tensor | None:
        marks.append(watch.now())
        if not keep_latents:
            latents.clear()
        # solvers may write into what they returned
        latents.append(latent[0].float().clone())
        if on_step is not None:
            # block diffusion takes all steps for every chunk
            total = getattr(pipe, "num_timesteps", None) or request.steps or 0
            on_step(len(marks) - 1, total)
        return None if on_latents is None else on_latents(len(marks) - 2, latent)

    handles = [model.register_forward_pre_hook(begin) for model in models_of(pipe).values()]
    call = {
        **call_of(pipe, request),
        "generator": torch.Generator().manual_seed(request.seed),
        "output_type": "pt",
    }
    watch.wait()
    start = time.perf_counter()
    try:
        with _after_steps(pipe.scheduler, end), _guided(pipe, request.guidance):
            made = pipe(**call)
        finished = watch.now()
        watch.wait()
        stop = time.perf_counter()
    finally:
        for handle in handles:
            handle.remove()
    frames = made.frames[0] if kind_of(pipe).video else made.images
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
        log.norm_rotary,
    )


@contextmanager
def _after_steps(scheduler: Any, done: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``done`` with the latents of every step, which go on as those that it returns, if any.

    All pipelines step their scheduler, but not all of them call back.
    """
    inner = scheduler.step
    own = "step" in vars(scheduler)

    @functools.wraps(inner)
    def step(*args: Any, **kwargs: Any) -> Any:
        made = inner(*args, **kwargs)
        as_tuple = isinstance(made, tuple)
        changed = done(made[0] if as_tuple else made.prev_sample)
        if changed is None:
            return made
        if as_tuple:
            return (changed, *made[1:])
        made.prev_sample = changed
        return made

    scheduler.step = step
    try:
        yield
    finally:
        if own:
            scheduler.step = inner
        else:
            del scheduler.step


@contextmanager
def _guided(pipe: Any, scale: float | None) -> Iterator[None]:
    """Another scale for a pipeline whose guidance is a component, which it gets back."""
    guider = guider_of(pipe)
    if guider is None or scale is None:
        yield
        return
    pipe.guider = guider.new(guidance_scale=scale)
    try:
        yield
    finally:
        pipe.guider = guider
