"""A call in groups of heads, so that the ordered copies of keys and values stay small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dit_accel.kernels.packed import Compact, compact, remembered

COPY_BYTES: float = 640 * 2**20
"""What the copies of a group may take, unless one head takes more."""
T = TypeVar("T")


def in_groups(
    run: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    code: Tensor,
    *,
    key_valid: Tensor | None,
    rest: Any,
    onto: tuple[Tensor, Tensor] | None,
    pairs: Tensor | None,
    orders: dict[str, Tensor],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``run`` for some heads at a time, into one result.

    Args:
        run: an implementation of `block_attention` that writes ``into`` a pair of tensors.
        q, k, v, code, key_valid, rest, onto, pairs: as of `block_attention`.
        orders: its orders and offsets, by name.
        options: what is the same for all heads.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    groups = list(groups_of(k))
    if len(groups) == 1:
        whole = {"key_valid": key_valid, "rest": rest, "onto": onto, "into": (out, lse)}
        run(q, k, v, code, pairs=pairs, **whole, **orders, **options)
        return out, lse
    for batch, heads in groups:

        def cut(x: T, batch: slice = batch, heads: slice = heads) -> T:
            return _cut(x, batch, heads)

        run(
            *(cut(x) for x in (q, k, v, code)),
            key_valid=None if key_valid is None else key_valid[batch],
            rest=cut(rest),
            onto=None if onto is None else (cut(onto[0]), cut(onto[1])),
            into=(cut(out), cut(lse)),
            pairs=None if pairs is None else cut(pairs),
            **_orders(orders, cut),
            **options,
        )
    return out, lse


def _orders(orders: dict[str, Tensor], cut: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The orders of a group, and what is known of those of all heads."""
    made = {name: cut(x) for name, x in orders.items()}
    for side in "qk":
        perm, offsets = (f"{side}_{what}" for what in ("perm", "offsets"))
        if made[perm] is not orders[perm] and made[offsets] is not orders[offsets]:
            every = compact(orders[perm], orders[offsets], None)
            some = Compact(*(cut(x) for x in every))
            remembered(made[perm], made[offsets], "compact", lambda some=some: some)  # type: ignore[misc]
    return made


def groups_of(k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Batch elements and heads of every group: all, or some heads of one element."""
    batch, heads, length, depth = k.shape
    each = 2 * length * depth * k.element_size()
    if batch * heads * each <= COPY_BYTES:
        yield slice(None), slice(None)
        return
    parts = min(heads, math.ceil(heads * each / COPY_BYTES))
    # as even as can be
    ends = [heads * (i + 1) // parts for i in range(parts)]
    for b in range(batch):
        for first, last in zip([0, *ends], ends, strict=False):
            yield slice(b, b + 1), slice(first, last)


def _cut(x: T, batch: slice, heads: slice) -> T:
    """A tensor ``[B|1, H|1, ...]``, or a record of such, as the terms of a rest, of a group."""
    if is_dataclass(x) and not isinstance(x, type):
        tensors = {
            one.name: _cut(getattr(x, one.name), batch, heads)
            for one in fields(x)
            if isinstance(getattr(x, one.name), Tensor)
        }
        return replace(x, **tensors)
    if not isinstance(x, Tensor) or batch == heads == slice(None):
        return x
    some = x[batch] if x.shape[0] > 1 else x
    # what is shared stays the tensor that things are remembered by
    return some[:, heads] if x.shape[1] > 1 else some  # type: ignore[return-value]
