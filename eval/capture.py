"""Queries, keys and values of one attention layer, taken from a generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.layout import Blocked, Raster
from dit_accel.method import Method, Schedule
from dit_accel.pipelines import plug
from dit_accel.pipelines.families import family_of, models_of
from dit_accel.pipelines.generate import Request, effective, generate
from dit_accel.rest import Drop
from dit_accel.route import Everything
from dit_accel.types import Context


@dataclass(frozen=True, slots=True)
class Captured:
    """What one call of a self-attention layer was given.

    Attributes:
        q, k, v: ``[B, H, L, D]``, after norms and rotary embedding.
        ctx: where the call happened; without a state.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ctx: Context


class _Enough(Exception):
    """Everything asked for was seen."""


@dataclass(slots=True)
class _Tap:
    """A layout that takes a copy of what passes."""

    steps: frozenset[int]
    found: dict[int, Captured] = field(default_factory=dict)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None
    ) -> Blocked:
        # of several guidance branches, the first of a step: the prompt's own
        if ctx.step in self.steps and ctx.step not in self.found:
            bare = Context(
                ctx.geometry, ctx.step, ctx.num_steps, ctx.layer, ctx.num_layers, ctx.branch
            )
            q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
            self.found[ctx.step] = Captured(q, k, v, bare)
        return Raster()(q, k, v, ctx, scale)


def capture(
    pipe: Any,
    request: Request,
    layer: int,
    steps: Iterable[int],
    on_step: Callable[[int, int], None] | None = None,
) -> dict[int, Captured]:
    """Generate densely as far as the last of some steps, and take what a layer was given there.

    Args:
        pipe: a diffusers pipeline; it is left with its own processors.
        request: what to generate.
        layer: number of the self-attention layer; negative ones count from the last.
        steps: denoising steps, from 0.
        on_step: called after every step with how many are done, and of how many.

    Returns:
        By step.

    Raises:
        InputError: there is no such layer or step, or the request does not fit the model.
    """
    transformer = next(iter(models_of(pipe).values()))
    count = len(family_of(transformer).self_attention(transformer))
    if not -count <= layer < count:
        raise InputError(f"layer: expected one of {count}, from 0, got {layer}")
    last = effective(pipe, request).steps or 0
    wanted = frozenset(steps)
    for step in wanted:
        if not 0 <= step < last:
            raise InputError(f"step: expected one of {last}, from 0, got {step}")
    tap = _Tap(wanted)
    others = tuple(number for number in range(count) if number != layer % count)
    plug.accelerate(pipe, Method(tap, Everything(), Drop(), Schedule(dense_layers=others)))

    def after(done: int, total: int) -> None:
        if on_step is not None:
            on_step(done, total)
        if len(tap.found) == len(wanted):
            raise _Enough

    try:
        generate(pipe, request, on_step=after)
    except _Enough:
        pass
    finally:
        plug.restore(pipe)
        plug.prepare(pipe)
    return tap.found
