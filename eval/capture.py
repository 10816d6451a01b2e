"""Queries, keys and values of one attention layer, taken from a generation."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
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
    """What one head of a self-attention layer was given, for the first element of the batch.

    Attributes:
        q, k, v: fp32 ``[1, 1, L, D]``, after norms and rotary embedding.
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

    head: int
    steps: frozenset[int]
    found: dict[int, Captured] = field(default_factory=dict)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None
    ) -> Blocked:
        # of several guidance branches, the first of a step: the prompt's own
        if ctx.step in self.steps and ctx.step not in self.found:
            valid = ctx.geometry.key_valid
            where = replace(ctx.geometry, key_valid=None if valid is None else valid[:1].clone())
            head = slice(self.head, self.head + 1)
            bare = replace(ctx, geometry=where, state=None)
            q1, k1, v1 = (x[:1, head].to(torch.float32, copy=True) for x in (q, k, v))
            self.found[ctx.step] = Captured(q1, k1, v1, bare)
        return Raster()(q, k, v, ctx, scale)


def check(pipe: Any, request: Request, layer: int, head: int, steps: Collection[int]) -> int:
    """How many layers there are, or an InputError as `capture` raises it."""
    transformer = next(iter(models_of(pipe).values()))
    family = family_of(transformer)
    if family is None:
        raise InputError(f"capture: expected a supported pipeline, got a {type(pipe).__name__}")
    attention = family.self_attention(transformer)
    count = len(attention)
    if not -count <= layer < count:
        raise InputError(f"layer: expected one of {count}, from 0, got {layer}")
    heads = attention[layer].heads
    if not 0 <= head < heads:
        raise InputError(f"head: expected one of {heads}, from 0, got {head}")
    last = effective(pipe, request).steps or 0
    for step in steps:
        if not 0 <= step < last:
            raise InputError(f"step: expected one of {last}, from 0, got {step}")
    return count


def capture(
    pipe: Any,
    request: Request,
    layer: int,
    head: int,
    steps: Collection[int],
    on_step: Callable[[int, int], None] | None = None,
) -> dict[int, Captured]:
    """Generate densely as far as the last of some steps, and take what a layer was given there.

    Args:
        pipe: a diffusers pipeline; it is left with its own processors.
        request: what to generate.
        layer: number of the self-attention layer; negative ones count from the last.
        head: of that layer.
        steps: denoising steps, from 0.
        on_step: called after every step with how many are done, and of how many.

    Returns:
        By step.

    Raises:
        InputError: there is no such layer, head or step, or the request does not fit the model.
    """
    count = check(pipe, request, layer, head, steps)
    wanted = frozenset(steps)
    tap = _Tap(head, wanted)
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
