"""Blocks as kernels read them: flat, bounded in size beforehand, never read by the host."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dit_accel.kernels.first_use import rehearsing

LENGTH_BITS = 8
"""A tile is one number: how long it is in the lowest bits, ..."""
START_BIT = LENGTH_BITS + 3
"""... then of how many keys each of its rows is the mean, less one, and from here on its start."""
MOST_ROWS = 1 << (31 - START_BIT)
"""Rows of a head that such numbers can tell apart."""
BLOCK_BIT = 4
"""The block of a tile, shifted by so many bits, and the level that it is pooled to."""


T = TypeVar("T")
# by the offsets' number, with what tells whether it is still theirs
_known: dict[int, tuple[weakref.ref[Tensor], dict[Hashable, Any]]] = {}


def remembered(perm: Tensor, offsets: Tensor, what: Hashable, make: Callable[[], T]) -> T:
    """What is made of an order, kept as long as the order is.

    A layout that depends on the grid alone gives the same tensors at every step, and launching a
    dozen small operations anew takes longer than a short sequence's attention.
    """
    if rehearsing():
        return make()
    number = id(offsets)
    owner = _known.get(number)
    if owner is None or owner[0]() is not offsets:
        # when one goes, so does what is known of it
        owner = weakref.ref(offsets, lambda gone: _forget(number, gone)), {}
        _known[number] = owner
    known = owner[1]
    found = known.get(what)
    if found is not None and found[0]() is perm:
        return found[1]  # type: ignore[no-any-return]
    made = make()
    known[what] = weakref.ref(perm), made
    return made


def _forget(number: int, gone: weakref.ref[Tensor]) -> None:
    found = _known.get(number)
    if found is not None and found[0] is gone:
        del _known[number]


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
    if valid.is_inference():  # it may have been written to since, and nothing would tell
        return _masked(perm, offsets, valid)
    # every layer of a forward has the same mask
    known: list[tuple[Any, int, Compact]] = remembered(perm, offsets, "masked", list)
    if not known or known[0][0]() is not valid or known[0][1] != valid._version:
        known[:] = [(weakref.ref(valid), valid._version, _masked(perm, offsets, valid))]
    return known[0][2]


def _masked(perm: Tensor, offsets: Tensor, valid: Tensor) -> Compact:
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
    return _cut(starts, sizes, length, size, longest, 1)


def _cut(
    starts: Tensor, sizes: Tensor, length: int, size: int, longest: int | None, level: int
) -> Tiles:
    """Runs of rows cut every ``size``; each row is the mean of ``level`` keys."""
    blocks = sizes.shape[-1]
    shape = (level - 1) << LENGTH_BITS
    if longest is not None and longest <= size:
        span = torch.where(sizes > 0, (starts << START_BIT) | shape | sizes, 0)
        block = torch.arange(blocks, dtype=torch.int32, device=sizes.device)
        block = (block << BLOCK_BIT) + level
        return Tiles(block.expand(sizes.shape).contiguous(), span.to(torch.int32).contiguous())
    most = blocks + length // size
    if longest is not None:
        most = min(most, blocks * -(-longest // size))
    per_block = -(-sizes // size)
    ends = per_block.cumsum(-1)
    number = torch.arange(most, device=sizes.device).expand(*sizes.shape[:2], -1).contiguous()
    block = torch.searchsorted(ends, number, right=True)
    exists = block < blocks
    block = block.clamp(max=max(0, blocks - 1))
    shift = (number - (ends - per_block).gather(2, block)) * size
    start = starts.gather(2, block) + shift
    count = (sizes.gather(2, block) - shift).clamp(max=size)
    span = torch.where(exists, (start << START_BIT) | shape | count, 0)
    return Tiles(((block << BLOCK_BIT) + level).to(torch.int32), span.to(torch.int32))


class Pooled(NamedTuple):
    """Where the means of each level stand in a table behind the keys, and their tiles.

    ``span`` int32 ``[B|1, H|1, R]``, the keys that each row is the mean of, level by level;
    ``tiles`` of all levels together, ``widths`` of them by level; ``height``, rows of the table.
    """

    span: Tensor
    tiles: Tiles
    widths: dict[int, int]
    height: int


def pooled(
    offsets: Tensor,
    length: int,
    levels: tuple[int, ...],
    size: int,
    longest: int | None = None,
) -> Pooled:
    """Blocks pooled to some levels, in tiles of up to ``size`` means.

    The last mean of a block may be of fewer keys, and is then a tile of its own.
    """
    counts = offsets.diff(dim=-1).long()
    rows: list[Tensor] = []
    parts, base = [], length
    widths = {}
    for level in levels:
        # none for empty blocks, which bounded tiles would have
        within = None if longest is None or longest <= level else longest
        rows.append(tiles(offsets, length, level, within).span)
        per_block = -(-counts // level)
        first = per_block.cumsum(-1) - per_block + base
        whole, left = counts // level, counts % level
        most = None if longest is None else max(1, longest // level)
        parts.append(_cut(first, whole, length // level, size, most, level))
        span = ((first + whole) << START_BIT) | ((left - 1) << LENGTH_BITS) | 1
        block = (torch.arange(counts.shape[-1], device=counts.device) << BLOCK_BIT) + level
        parts.append(
            Tiles(
                block.expand(counts.shape).to(torch.int32),
                torch.where(left > 0, span, 0).to(torch.int32),
            )
        )
        widths[level] = sum(part.span.shape[-1] for part in parts[-2:])
        base += rows[-1].shape[-1]
    joined = (torch.cat(column, -1).contiguous() for column in zip(*parts, strict=True))
    return Pooled(torch.cat(rows, -1).contiguous(), Tiles(*joined), widths, base)
