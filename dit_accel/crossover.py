"""From what length on a method is faster than dense attention, as measured, by architecture.

``crossovers.json`` beside this file is what ``dit-accel bench crossover`` measured. A method in a
pipeline steps aside for dense attention where a sequence is shorter (``dense_below="auto"`` of its
schedule), on a GPU of an architecture that was measured, and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

import torch
from torch import Tensor

from dit_accel.config import plain_options
from dit_accel.density import share_at
from dit_accel.errors import InputError
from dit_accel.method import Method
from dit_accel.types import Context

DTYPES = (torch.bfloat16, torch.float16)
"""What the figures, measured in bf16, are for."""
_MOST = 4096
"""Calls that a `Chooser` remembers."""


class DenseWarning(UserWarning):
    """A method steps aside for dense attention, which is faster at this length."""


@dataclass(frozen=True, slots=True)
class Crossover:
    """One measured setting.

    Attributes:
        method, options: a preset and its effective options, without schedule and share.
        share: its density, or what its budget is called; ``None`` where it has none.
        layer: the layer, modulo how many a layout treats in turn; ``None`` where all are alike.
        heads, head_dim: of the batch together, and the size of each.
        against: which dense attention: ``"sdpa"``, torch's own choice, or the ``"best"`` of that
            and cuDNN.
        tokens: the shortest length measured from which on the method was faster at every one;
            ``None`` where it was not at the longest.
        longest: the longest that was measured.
    """

    method: str
    options: Mapping[str, Any]
    share: float | None
    layer: int | None
    heads: int
    head_dim: int
    against: Literal["sdpa", "best"]
    tokens: int | None
    longest: int

    def says_dense(self, length: int) -> bool:
        """Whether dense attention is the faster one at a length, as far as was measured."""
        return length < self.tokens if self.tokens is not None else length <= self.longest


@dataclass(frozen=True, slots=True)
class Choice:
    """Dense attention in place of a method, and why."""

    reason: str


def options_of(method: Method) -> dict[str, Any] | None:
    """What tells settings apart that differ in speed: options without schedule and share.

    ``None`` for what no preset made, or with parts that are none of this library's.
    """
    budget = method.budget
    try:
        options = plain_options(method.options)
    except InputError:
        return None
    left_out = {"dense_steps", "dense_layers", "dense_below", "dense_backend", "seed"}
    if budget is not None:
        left_out.add(budget[0])
    return {name: value for name, value in options.items() if name not in left_out}


@lru_cache(maxsize=8)
def measured(architecture: str) -> tuple[Crossover, ...]:
    """The figures for a compute capability, such as ``"9.0"``; none for most."""
    text = files("dit_accel").joinpath("crossovers.json").read_text()
    return tuple(Crossover(**row) for row in json.loads(text).get(architecture, {}).get("rows", ()))


def architecture_of(device: torch.device) -> str | None:
    """The compute capability of a CUDA device; ``None`` for any other."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def choose(
    method: Method,
    ctx: Context,
    like: Tensor,
    heads: int,
    head_dim: int,
    against: Literal["sdpa", "best"] = "sdpa",
) -> Choice | None:
    """Dense attention in place of a method, if it was measured to be faster here.

    Args:
        method: with ``dense_below="auto"``, and no backend of its own for dense attention.
        ctx: the call.
        like: of its dtype and device.
        heads: of all elements of the batch together.
        head_dim: the size of one.
        against: which dense attention would run: torch's choice, or another.

    Returns:
        The choice, or ``None``: the method is as fast, or there is no figure for such a call. A
        share between two that were measured counts as the larger one, and heads as the smaller.
    """
    if method.schedule.dense_below != "auto" or method.layout is None or method.backend is not None:
        return None
    architecture = architecture_of(like.device)
    if architecture is None or like.dtype not in DTYPES or ctx.prefix is not None:
        return None
    budget, period = method.budget, method.period
    row = find(
        measured(architecture),
        method,
        share=None if budget is None else share_at(*budget, ctx),
        layer=None if period is None else ctx.layer % period,
        heads=heads,
        head_dim=head_dim,
        against=against,
    )
    if row is None or not row.says_dense(ctx.geometry.length):
        return None
    return Choice(_reason(row, architecture, "" if budget is None else budget[0]))


class Chooser:
    """`choose` for a method, which looks up what it has found before.

    Attributes:
        method: which.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._known: dict[Any, Choice | None] = {}

    def __call__(
        self,
        ctx: Context,
        like: Tensor,
        heads: int,
        head_dim: int,
        against: Literal["sdpa", "best"] = "sdpa",
    ) -> Choice | None:
        """As `choose`."""
        if self.method.schedule.dense_below != "auto":
            return None
        budget = self.method.budget
        share = None if budget is None else share_at(*budget, ctx)
        where = ctx.geometry.length, ctx.layer, ctx.prefix is None
        key = (*where, share, like.dtype, like.device, heads, head_dim, against)
        if key not in self._known:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = choose(self.method, ctx, like, heads, head_dim, against)
        return self._known[key]


def _reason(row: Crossover, architecture: str, share: str) -> str:
    settings = [f"{row.heads} heads of {row.head_dim}"]
    settings += [] if row.share is None else [f"{share} {row.share:g}"]
    settings += [] if row.layer is None else [f"layer {row.layer}"]
    if row.tokens is None:
        found = f"it was slower than dense attention at up to {row.longest:,} tokens"
    else:
        found = f"it was faster than dense attention from {row.tokens:,} tokens on"
    where = f"sm_{architecture.replace('.', '')} with {', '.join(settings)}"
    return (
        f"{row.method}: dense attention takes its place, since on {where} {found}; dense_below=0 "
        "turns this off"
    )


def find(
    rows: Sequence[Crossover],
    method: Method,
    *,
    share: float | None,
    layer: int | None,
    heads: int,
    head_dim: int,
    against: str,
) -> Crossover | None:
    """The figure for a method: of the next larger share, and the next smaller number of heads."""
    options = options_of(method)
    fitting = [
        row
        for row in rows
        if (row.method, row.layer, row.head_dim, row.against)
        == (method.name, layer, head_dim, against)
        and row.options == options
        and row.heads <= heads
        and (row.share is None) == (share is None)
        and (row.share is None or share is None or row.share >= share)
    ]
    return min(fitting, key=lambda row: (row.share or 0.0, -row.heads), default=None)
