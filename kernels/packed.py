"""Blocks as kernels read them: flat, bounded in size beforehand, never read by the host."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LENGTH_BITS = 8
"""A tile is one number: how long it is in the lowest bits, ..."""
START_BIT = LENGTH_BITS + 3
"""... then of how many keys each of its rows is the mean, less one, and from here on its start."""
MOST_ROWS = 1 << (31 - START_BIT)
"""Rows of a head that such numbers can tell apart."""
BLOCK_BIT = 4
"""The block of a tile, shifted by so many bits, and the level that it is pooled to."""


T = TypeVar("T")
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remembered(perm: Tensor, offsets: Tensor, what: Hashable, make: Callable[[], T]) -> T:
    """What is made of an order, kept as long as the order is.

    A layout that depends on the grid alone gives the same tensors at every step, and launching a
    dozen small operations anew takes longer than a short sequence's attention.
    """
    known = _known.setdefault(offsets, {})
    found = known.get(what)
    if found is not None and found[0]() is perm:
        return found[1]  # type: ignore[no-any-return]
    made = make()
    known[what] = weakref.ref(perm), made
    return made


class Compact(NamedTuple):
    """An order without its padding.

    ``perm`` int32 ``[B|1, H|1, L]``, the valid tokens first, then -1; ``offsets`` int32
    ``[B|1, H|1, N + 1]`` into it.
    """

    perm: Tensor
    offsets: Tensor


def compact(perm: Tensor, offsets: Tensor, valid: Tensor | None) -> Compact:
    """Take padding out of an order.

    Args:
        perm: int64 ``[B|1, H|1, L]``.
        offsets: integer ``[B|1, H|1, N + 1]``.
        valid: bool ``[B, L]`` by token, or ``None`` when every token is.
    """
    if valid is None:
        return remembered(perm, offsets, "compact", lambda: _plain(perm, offsets))
    batch, heads = valid.shape[0], max(perm.shape[1], offsets.shape[1])
    perm = perm.expand(batch, heads, -1)
    bounds = offsets.long().expand(batch, heads, -1)
    keep = valid[:, None].expand(-1, heads, -1).gather(2, perm)
    before = torch.nn.functional.pad(keep.cumsum(-1), (1, 0))
    # one place more than tokens: padding is written there
    place = torch.where(keep, before[..., :-1], keep.shape[-1])
    made = perm.new_full((batch, heads, keep.shape[-1] + 1), -1).scatter_(2, place, perm)
    packed = made[..., :-1].to(torch.int32).contiguous()
    return Compact(packed, before.gather(2, bounds).to(torch.int32).contiguous())


def _plain(perm: Tensor, offsets: Tensor) -> Compact:
    # an alias, since what is remembered of a tensor must not keep it
    bounds = offsets.to(torch.int32).contiguous().detach()
    return Compact(perm.to(torch.int32).contiguous(), bounds)


class Tiles(NamedTuple):
    """Blocks cut into tiles of bounded length.

    ``block`` int32 ``[B|1, H|1, T]``, the block and the level of each tile (`BLOCK_BIT`); ``span``
    int32 of that shape, its start and length (`START_BIT`), 0 for tiles that do not exist.
    """

    block: Tensor
    span: Tensor


def tiles(offsets: Tensor, length: int, size: int, longest: int | None = None) -> Tiles:
    """Cut blocks every ``size`` tokens.

    Args:
        offsets: int32 ``[B|1, H|1, N + 1]``.
        length: tokens in all.
        size: longest tile, below ``2 ** LENGTH_BITS``.
        longest: tokens of the longest block, where the caller knows; bounds how many tiles are
            made.
    """
    starts, sizes = offsets[..., :-1].long(), offsets.diff(dim=-1).long()
    blocks = sizes.shape[-1]
    if longest is not None and longest <= size:
        span = torch.where(sizes > 0, (starts << START_BIT) | sizes, 0)
        block = torch.arange(blocks, dtype=torch.int32, device=offsets.device)
        block = (block << BLOCK_BIT) + 1
        return Tiles(block.expand(sizes.shape).contiguous(), span.to(torch.int32).contiguous())
    most = blocks + length // size
    if longest is not None:
        most = min(most, blocks * -(-longest // size))
    per_block = -(-sizes // size)
    ends = per_block.cumsum(-1)
    number = torch.arange(most, device=offsets.device).expand(*sizes.shape[:2], -1).contiguous()
    block = torch.searchsorted(ends, number, right=True)
    exists = block < blocks
    block = block.clamp(max=max(0, blocks - 1))
    shift = (number - (ends - per_block).gather(2, block)) * size
    start = starts.gather(2, block) + shift
    count = (sizes.gather(2, block) - shift).clamp(max=size)
    span = torch.where(exists, (start << START_BIT) | count, 0)
    return Tiles(((block << BLOCK_BIT) + 1).to(torch.int32), span.to(torch.int32))
