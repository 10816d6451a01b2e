"""One generation, measured: frames, seconds of every step, density of every step and layer."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.pipelines.families import models_of
from dit_accel.pipelines.plug import session_of
from dit_accel.pipelines.request import Request, call_of, effective, guider_of, kind_of


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
    """

    frames: Tensor
    seconds: float
    step_seconds: tuple[float, ...]
    decode_seconds: float
    density: float | None
    by_step: dict[int, float]
    by_layer: dict[int, float]


@torch.inference_mode()
def generate(
    pipe: Any, request: Request, on_step: Callable[[int, int], None] | None = None
) -> Generation:
    """Run a pipeline once.

    Args:
        pipe: from `load`, with whatever processors it has.
        request: what to generate.
        on_step: called after every step with how many are done, and of how many.

    Raises:
        InputError: the request does not fit the model.
    """
    request = effective(pipe, request)
    marks: list[float] = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(*_: Any) -> None:
        if not marks:
            marks.append(now())

    def end() -> None:
        marks.append(now())
        if on_step is not None:
            on_step(len(marks) - 1, request.steps or 0)

    handles = [model.register_forward_pre_hook(begin) for model in models_of(pipe).values()]
    call = {
        **call_of(pipe, request),
        "generator": torch.Generator().manual_seed(request.seed),
        "output_type": "pt",
    }
    start = now()
    try:
        with _after_steps(pipe.scheduler, end), _guided(pipe, request.guidance):
            made = pipe(**call)
        stop = now()
    finally:
        for handle in handles:
            handle.remove()
    frames = made.frames[0] if kind_of(pipe).video else made.images
    log = session_of(pipe).log
    return Generation(
        frames.float().cpu(),
        stop - start,
        tuple(after - before for before, after in itertools.pairwise(marks)),
        stop - marks[-1],
        log.density,
        log.by_step,
        log.by_layer,
    )


@contextmanager
def _after_steps(scheduler: Any, done: Callable[[], None]) -> Iterator[None]:
    """Call ``done`` after every step; not all pipelines call back, but all step their scheduler."""
    inner = scheduler.step
    own = "step" in vars(scheduler)

    @functools.wraps(inner)
    def step(*args: Any, **kwargs: Any) -> Any:
        made = inner(*args, **kwargs)
        done()
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
