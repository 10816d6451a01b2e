"""Blocks of unequal length, for the plain-torch references.

An operation gets a permutation and offsets; padding (``key_valid = False``) is taken out of the
order before anything is computed, so that what it holds, be it NaN, can reach no result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 8 * 2**20
"""What one chunk of a reference may take. Chunks of this size stay in a CPU's last-level cache."""


class Order(NamedTuple):
    """One head's order without its padding.

    ``tokens`` int64 ``[M]``: token at each position. ``starts``, ``sizes`` int64 ``[N]``: blocks.
    """

    tokens: Tensor
    starts: Tensor
    sizes: Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64, everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pick(tensor: Tensor, batch: int, head: int) -> Tensor:
    """``tensor[b, h]``, where both leading dimensions may be 1."""
    return tensor[batch if tensor.shape[0] > 1 else 0, head if tensor.shape[1] > 1 else 0]


def order_of(perm: Tensor, offsets: Tensor, valid: Tensor | None, batch: int, head: int) -> Order:
    """One head's blocks, with the padding removed.

    Args:
        perm: int64 ``[B|1, H|1, L]``.
        offsets: integer ``[B|1, H|1, N + 1]``.
        valid: bool ``[B, L]`` by token, or ``None`` when every token is.
        batch, head: which head.
    """
    tokens, bounds = pick(perm, batch, head), pick(offsets, batch, head).long()
    if valid is not None:
        keep = valid[batch][tokens]
        before = torch.zeros(keep.numel() + 1, dtype=torch.int64, device=keep.device)
        torch.cumsum(keep, 0, out=before[1:])
        tokens, bounds = tokens[keep], before[bounds]
    return Order(tokens, bounds[:-1], bounds.diff())


class Pool(NamedTuple):
    """Consecutive tokens of every block, a few averaged into one.

    ``group`` int64 ``[M]``: the pooled entry of each token. ``number`` int64 ``[P]``: tokens in an
    entry. ``starts``, ``sizes`` int64 ``[N]``: the entries of each block.
    """

    group: Tensor
    number: Tensor
    starts: Tensor
    sizes: Tensor


def pool_of(starts: Tensor, sizes: Tensor, level: int) -> Pool:
    """Pool every block's tokens by ``level``; its last entry may hold fewer.

    Args:
        starts, sizes: int64 ``[N]``, blocks that follow each other without a gap.
        level: tokens in an entry.
    """
    pooled = -(-sizes // level)
    first = pooled.cumsum(0) - pooled
    total = int(sizes.sum())
    block = torch.arange(sizes.numel(), device=sizes.device)
    block = block.repeat_interleave(sizes, output_size=total)
    inside = torch.arange(total, device=sizes.device) - starts[block]
    group = first[block] + inside // level
    number = torch.zeros(int(pooled.sum()), dtype=torch.int64, device=sizes.device)
    number.index_add_(0, group, torch.ones_like(group))
    return Pool(group, number, first, pooled)


def positions(starts: Tensor, sizes: Tensor) -> Tensor:
    """``[start .. start + size)`` of every block, one after the other. int64 ``[Σ sizes]``."""
    if sizes.numel() == 0:
        return sizes
    size, most = (int(x) for x in sizes.aminmax())
    if size == most:  # all alike, as in most plans: no need to repeat block by block
        steps = torch.arange(size, device=starts.device)
        return (starts.unsqueeze(1) + steps).view(-1)
    total = int(sizes.sum())
    shift = starts - (sizes.cumsum(0) - sizes)
    repeated = shift.repeat_interleave(sizes, output_size=total)
    return repeated.add_(torch.arange(total, device=starts.device))


def pad_rows(flat: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows of unequal length as a rectangle.

    Args:
        flat: int64 ``[Σ counts]``, the rows one after the other.
        counts: int64 ``[G]``.

    Returns:
        ``[G, max]``, padded with 0, and bool ``[G, max]`` that is ``True`` on padding, or ``None``
        when there is none.
    """
    width = int(counts.max()) if counts.numel() else 0
    if flat.numel() == counts.numel() * width:
        return flat.view(counts.numel(), width), None
    inside = torch.arange(width, device=flat.device) < counts.unsqueeze(1)
    rows = flat.new_zeros(inside.shape)
    rows[inside] = flat
    return rows, ~inside


def chunks(widths: list[int], cost_per_unit: int, budget: int) -> Iterator[tuple[int, int]]:
    """Cut rows, sorted by rising width, into runs whose padded cost stays in the budget.

    Yields ``(first, last + 1)``; every run has at least one row. Cost is rows x widest x unit.
    """
    first = 0
    while first < len(widths):
        last = first + 1
        while last < len(widths) and (last + 1 - first) * widths[last] * cost_per_unit <= budget:
            last += 1
        yield first, last
        first = last


class Workspace:
    """Buffers that are used again and again, so that no chunk has to fault in new pages."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised buffer of this shape. It is overwritten by the next ``take(name)``."""
        size = 1
        for length in shape:
            size *= length
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=self._dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)
