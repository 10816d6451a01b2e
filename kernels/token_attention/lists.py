"""What each tile of queries goes through, where every token has key blocks of its own choice.

Blocks are taken by the group, up to 16 at once. A token's choice among a group is a word of as many
bits. The tokens of a group are sorted by that word's place in the Gray code, by counting, in one
program a group; then most tiles of 128 hold tokens of one choice or of a few that are alike. A tile
goes through the union of its tokens' blocks, cut into boxes: first those that all of them chose.
The host reads nothing: lists have room for every token, and what was found is counted beside them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import LENGTH_BITS, START_BIT, Compact, Tiles, remembered, tiles
from dit_accel.kernels.specimen import Specimen, alike
from dit_accel.kernels.token_attention.dealing import bytes_of as bytes_of_dealing
from dit_accel.kernels.token_attention.sorting import sort
from dit_accel.kernels.token_attention.sorting import specimens as of_sorting
from dit_accel.kernels.word_bits import word_bit
from dit_accel.kernels.words import Words, grouping

ROWS = 128
"""Queries of a tile."""
AHEAD = 8
"""Empty entries after every list: what a turn may read beyond it."""
ENTRY_BITS = 7
"""An entry is a box's length in so many bits, its block's bit in four more, and its start."""
ITEM = 8
"""Numbers of an item: unit, tile, queries, boxes that all chose, boxes, where its list is; batch
element and head."""
_CHUNK = 128
"""Boxes that are looked at together."""
_SUMMED = 512
"""Units whose items are added up together."""
_AHEAD = tl.constexpr(AHEAD)
_ITEM = tl.constexpr(ITEM)
_ENTRY = tl.constexpr(ENTRY_BITS)
_START = tl.constexpr(START_BIT)
_LENGTH = tl.constexpr((1 << LENGTH_BITS) - 1)


@triton.jit(
    do_not_specialize=[
        *("heads", "padded", "groups", "size", "first_pair", "tiles", "span_b", "span_h"),
        *("start_b", "start_h", "boxes"),
    ]
)
def _pack(
    sorted_ptr,
    count_ptr,
    first_ptr,
    block_ptr,
    span_ptr,
    start_ptr,
    item_ptr,
    list_ptr,
    heads,
    padded,
    groups,
    size,
    first_pair,
    tiles,
    boxes,
    span_b,
    span_h,
    start_b,
    start_h,
    BOX: tl.constexpr,
    BM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The boxes of a tile of tokens: those that all of them chose first."""
    tile = tl.program_id(0)
    unit = tl.program_id(1)
    rows = tl.load(count_ptr + unit) - tile * BM
    if rows <= 0:
        return
    pair, group = unit // groups, unit % groups
    b, h = (first_pair + pair) // heads, (first_pair + pair) % heads
    lane = tl.arange(0, BM)
    place = unit.to(tl.int64) * padded + tile * BM + lane
    word = tl.load(sorted_ptr + place, mask=lane < rows, other=0).to(tl.int32) & 0xFFFF
    bits = tl.arange(0, 16)
    some = tl.max((word[:, None] >> bits[None, :]) & 1, 0)
    word = tl.where(lane < rows, word, 0xFFFF)
    every = tl.min((word[:, None] >> bits[None, :]) & 1, 0)
    some, every = tl.sum(some << bits, 0), tl.sum(every << bits, 0)
    start_ptr += b * start_b + h * start_h + group
    start, stop = tl.load(start_ptr), tl.load(start_ptr + 1)
    span_ptr += b * span_b + h * span_h
    block_ptr += b * span_b + h * span_h
    at = pair * tiles * (boxes + groups * _AHEAD)
    at += tiles * (start + group * _AHEAD) + tile * (stop - start + _AHEAD)
    target = list_ptr + at
    item = item_ptr + (tl.load(first_ptr + unit) + tile) * _ITEM
    done = 0
    for part in tl.static_range(2):
        for first in range(start, stop, CHUNK):
            number = first + tl.arange(0, CHUNK)
            inside = number < stop
            span = tl.load(span_ptr + number, mask=inside, other=0)
            block = tl.load(block_ptr + number, mask=inside, other=0) >> 4
            bit = word_bit(block - group * size)
            taken = inside & (((some >> bit) & 1) != 0) & (span != 0)
            count = span & _LENGTH
            plain = (count == BOX) & (((every >> bit) & 1) != 0)
            taken = taken & (plain if part == 0 else (plain == 0))
            entry = ((span >> _START) << _START) | (bit << _ENTRY) | count
            rank = tl.cumsum(taken.to(tl.int32), 0)
            tl.store(target + done + rank - 1, entry, mask=taken)
            done += tl.sum(taken.to(tl.int32), 0)
        tl.store(item + 3 + part, done)
    tl.store(target + done + tl.arange(0, _AHEAD), tl.zeros([_AHEAD], tl.int32))
    tl.store(item, unit)
    tl.store(item + 1, tile)
    tl.store(item + 2, tl.minimum(rows, BM))
    tl.store(item + 5, at)
    tl.store(item + 6, b)
    tl.store(item + 7, h)


@triton.jit(do_not_specialize=["units"])
def _firsts(count_ptr, first_ptr, units, ROWS: tl.constexpr, BT: tl.constexpr):
    """The first item of every unit."""
    before = 0
    for start in range(0, units, BT):
        unit = start + tl.arange(0, BT)
        count = tl.load(count_ptr + unit, mask=unit < units, other=0)
        items = (count + ROWS - 1) // ROWS
        end = before + tl.cumsum(items, 0)
        tl.store(first_ptr + unit, end - items, mask=unit < units)
        before += tl.sum(items, 0)
    tl.store(first_ptr + units, before)


class Boxes(NamedTuple):
    """The blocks of an order cut into boxes, and where the boxes of every group begin.

    ``start`` int32 ``[B|1, H|1, C + 1]``.
    """

    tiles: Tiles
    start: Tensor


class Lists(NamedTuple):
    """What is to be computed for some heads, a unit being a head and a group of blocks.

    ``token`` int32 and ``word`` int16 ``[U, padded]``, the tokens of a unit in order and what they
    chose; ``place`` int32 ``[U, L]``, where each token is, or -1; ``first`` int32 ``[U + 1]``, the
    first item of every unit; ``item`` int32 ``[U * T, ITEM]``; ``listed`` int32, boxes.
    """

    token: Tensor
    word: Tensor
    place: Tensor
    first: Tensor
    item: Tensor
    listed: Tensor


def boxes_of(order: Compact, length: int, size: int, box: int) -> Boxes:
    """Boxes of up to ``box`` keys, of groups of ``size`` blocks; remembered."""

    def make() -> Boxes:
        per_block = -(-order.offsets.diff(dim=-1) // box)
        ends = torch.nn.functional.pad(per_block.cumsum(-1, dtype=torch.int32), (1, 0))
        groups = -(-per_block.shape[-1] // size)
        at = torch.arange(groups + 1, device=ends.device) * size
        start = ends[..., at.clamp(max=per_block.shape[-1])]
        return Boxes(tiles(order.offsets, length, box), start.contiguous())

    return remembered(order.perm, order.offsets, ("boxes", size, box), make)


def bytes_of(length: int, blocks: int, box: int) -> int:
    """What the lists of one head take, beside the counts that are sorted by."""
    groups, _ = grouping(blocks)
    rows = -(-length // ROWS)
    kept: int = groups * (length * 4 + rows * ROWS * 6 + rows * ITEM * 4)
    kept += bytes_of_dealing(groups * rows)
    return kept + 4 * rows * (length // box + blocks + groups * AHEAD)


def lists(
    words: Words,
    found: Boxes,
    heads: int,
    first_pair: int,
    pairs: int,
    box: int,
    scratch: Tensor | None = None,
) -> Lists:
    """What some heads compute.

    Args:
        words: of ``[B|1, H|1, L, N]``.
        found: boxes of the keys.
        heads: ``H``.
        first_pair: ``b · H + h`` of the first head.
        pairs: how many.
        box: keys of a box, at most 64.
        scratch: uint8, memory that may be written to.
    """
    _, _, length, blocks = words.shape
    groups, size = grouping(blocks)
    rows = triton.cdiv(length, ROWS)
    units, padded = pairs * groups, rows * ROWS
    sorted_ = sort(words, heads, first_pair, pairs, padded, scratch)

    def room(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=words.word.device)

    first = room(units + 1)
    launch(_firsts, (1,), (sorted_.counts, first), (units,), ROWS=ROWS, BT=_SUMMED, num_warps=4)
    item = room(units * rows, ITEM)
    total = found.tiles.span.shape[-1]
    listed = room(pairs * rows * (total + groups * AHEAD))
    launch(
        _pack,
        (rows, units),
        (
            sorted_.word,
            sorted_.counts,
            first,
            found.tiles.block,
            found.tiles.span,
            found.start,
            item,
            listed,
        ),
        (
            *(heads, padded, groups, size, first_pair, rows, total),
            *lead_strides(found.tiles.span),
            *lead_strides(found.start),
        ),
        BOX=box,
        BM=ROWS,
        CHUNK=_CHUNK,
        num_warps=4,
    )
    return Lists(sorted_.token, sorted_.word, sorted_.place, first, item, listed)


def specimens() -> list[Specimen]:
    """The kernels as they are launched."""
    names = ("count", "first", "block", "span", "start", "item", "list")
    types = {"sorted_ptr": "*i16", **{f"{name}_ptr": "*i32" for name in names}}
    launches: list[tuple[Any, dict[str, Any]]] = [
        (_pack, {"BOX": 16, "BM": ROWS, "CHUNK": _CHUNK}),
        (_firsts, {"ROWS": ROWS, "BT": _SUMMED}),
    ]
    return [*of_sorting(), *alike(launches, types)]
