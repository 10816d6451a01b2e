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

from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import LENGTH_BITS, START_BIT, Compact, Tiles, remembered, tiles
from dit_accel.kernels.specimen import Specimen, typed
from dit_accel.kernels.word_bits import word_bit
from dit_accel.kernels.words import BITS, Words, grouping

ROWS = 128
"""Queries of a tile."""
AHEAD = 8
"""Empty entries after every list: what a turn may read beyond it."""
ENTRY_BITS = 7
"""An entry is a box's length in so many bits, its block's bit in four more, and its start."""
ITEM = 8
"""Numbers of an item: unit, tile, queries, boxes that all chose, boxes, where its list is."""
_SORTED = 512
"""Tokens that are sorted together."""
_PROGRAMS = 1500
"""Programs that sort at once, so that each does not wait for itself alone."""
_COUNTED = 1024
"""Tokens whose words are counted by a program."""
_SCANNED = 4096
"""Words whose tokens are added up together."""
_CHUNK = 128
"""Boxes that are looked at together."""
_BINS = tl.constexpr(1 << BITS)
_AHEAD = tl.constexpr(AHEAD)
_ITEM = tl.constexpr(ITEM)
_ENTRY = tl.constexpr(ENTRY_BITS)
_START = tl.constexpr(START_BIT)
_LENGTH = tl.constexpr((1 << LENGTH_BITS) - 1)


@triton.jit
def _code_of(word):
    """A word's place in the Gray code."""
    code = word ^ (word >> 1)
    code = code ^ (code >> 2)
    code = code ^ (code >> 4)
    return code ^ (code >> 8)


@triton.jit(do_not_specialize=["heads", "length", "groups", "blocks", "size"])
def _words(
    select_ptr, word_ptr, select_b, select_h, select_l,
    heads, length, groups, blocks, size, BT: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """For every group and token a word: which of the group's blocks the token chose."""
    pair = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    lane = tl.arange(0, BG * 16)
    group, number = tl.program_id(1) * BG + lane // 16, lane % 16
    column = group * size + number
    known = (number < size) & (column < blocks)
    mask = (token < length)[:, None] & known[None, :]
    select_ptr += pair // heads * select_b + pair % heads * select_h
    chosen = tl.load(
        select_ptr + token.to(tl.int64)[:, None] * select_l + column[None, :], mask=mask, other=0
    )
    bits = (chosen != 0).to(tl.int32) << word_bit(number)[None, :]
    word = tl.sum(tl.reshape(bits, [BT, BG, 16]), 2)
    group = tl.program_id(1) * BG + tl.arange(0, BG)
    where = (pair * groups + group)[None, :] * length + token[:, None]
    inside = (token < length)[:, None] & (group < groups)[None, :]
    tl.store(word_ptr + where, word.to(tl.int16), mask=inside)


@triton.jit
def _words_of(word_ptr, unit, heads, length, groups, first_pair, word_b, word_h):
    """Where the words of a unit begin."""
    pair = first_pair + unit // groups
    word_ptr += (pair // heads).to(tl.int64) * word_b + (pair % heads).to(tl.int64) * word_h
    return word_ptr + (unit % groups).to(tl.int64) * length


@triton.jit(
    do_not_specialize=["heads", "length", "groups", "first_pair", "word_b", "word_h", "run"]
)
def _count(
    word_ptr, bin_ptr, heads, length, groups, first_pair, word_b, word_h, run, segments,
    BT: tl.constexpr,
):  # fmt: skip
    """How many tokens of a segment have each word, by its place in the Gray code."""
    unit = tl.program_id(1)
    word_ptr = _words_of(word_ptr, unit, heads, length, groups, first_pair, word_b, word_h)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    word = tl.load(word_ptr + token, mask=token < length, other=0).to(tl.int32) & 0xFFFF
    bins = (unit.to(tl.int64) * segments + token // run) * _BINS + _code_of(word)
    tl.atomic_add(bin_ptr + bins, 1, mask=word != 0, sem="relaxed")


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["segments"])
def _starts(bin_ptr, count_ptr, segments, BT: tl.constexpr):
    """Where the tokens of each word and segment begin, from how many there are."""
    unit = tl.program_id(0).to(tl.int64)
    bin_ptr += unit * segments * _BINS + tl.arange(0, BT)
    count = 0
    for first in range(0, _BINS, BT):
        number = tl.load(bin_ptr + first)
        for segment in range(1, segments):
            number += tl.load(bin_ptr + segment * _BINS + first)
        start = count + tl.cumsum(number, 0) - number
        for segment in range(segments):
            at = bin_ptr + segment * _BINS + first
            here = tl.load(at)
            tl.store(at, start)
            start += here
        count += tl.sum(number, 0)
    tl.store(count_ptr + unit, count)


@triton.jit(
    do_not_specialize=[
        *("heads", "length", "padded", "groups", "first_pair", "word_b", "word_h", "run"),
    ]
)
def _sort(
    word_ptr,
    bin_ptr,
    token_ptr,
    sorted_ptr,
    place_ptr,
    heads,
    length,
    padded,
    groups,
    first_pair,
    word_b,
    word_h,
    run,
    BT: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The tokens of a group that chose something, in the order of their words."""
    segment = tl.program_id(0)
    number = tl.program_id(1)
    word_ptr = _words_of(word_ptr, number, heads, length, groups, first_pair, word_b, word_h)
    unit = number.to(tl.int64)
    place_ptr += unit * length
    token_ptr += unit * padded
    sorted_ptr += unit * padded
    bin_ptr += (unit * tl.num_programs(0) + segment) * _BINS
    lane = tl.arange(0, BT)
    for first in range(segment * run, tl.minimum(segment * run + run, length), BT):
        token = first + lane
        word = tl.load(word_ptr + token, mask=token < length, other=0).to(tl.int32) & 0xFFFF
        none = (token < length) & (word == 0)
        tl.store(place_ptr + token, tl.full([BT], -1, tl.int32), mask=none)
        key = tl.where(word != 0, _code_of(word), _BINS)
        key = tl.sort((key << SHIFT) | lane)
        code = key >> SHIFT
        token = first + (key & (BT - 1))
        some = code < _BINS
        # those of one word, one after another, go where the last of them ended
        before = tl.gather(code, tl.maximum(lane - 1, 0), 0)
        behind = tl.gather(code, tl.minimum(lane + 1, BT - 1), 0)
        start = tl.where((lane == 0) | (before != code), lane, 0)
        rank = lane - tl.associative_scan(start, 0, _larger)
        place = tl.load(bin_ptr + code, mask=some, other=0) + rank
        tl.debug_barrier()
        last = some & ((lane == BT - 1) | (behind != code))
        tl.store(bin_ptr + code, place + 1, mask=last)
        tl.store(token_ptr + place, token, mask=some)
        tl.store(sorted_ptr + place, (code ^ (code >> 1)).to(tl.int16), mask=some)
        tl.store(place_ptr + token, place, mask=some)
        tl.debug_barrier()


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


def pack(select: Tensor) -> Words:
    """bool ``[B|1, H|1, L, N]`` as words."""
    batch, heads, length, blocks = select.shape
    select = select if select.stride(3) == 1 else select.contiguous()
    groups, size = grouping(blocks)
    word = torch.empty(batch, heads, groups, length, dtype=torch.int16, device=select.device)
    _words[(triton.cdiv(length, 128), triton.cdiv(groups, 2), batch * heads)](
        select,
        word,
        *select.stride()[:3],
        heads,
        length,
        groups,
        blocks,
        size,
        BT=128,
        BG=2,
        num_warps=4,
    )
    return Words(word, blocks)


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
    return kept + 4 * rows * (length // box + blocks + groups * AHEAD)


def segments_of(units: int, length: int, room: int) -> int:
    """Into how many segments a unit's tokens are cut, each of them sorted by a program.

    Args:
        units: of all heads that are sorted together.
        length: tokens.
        room: numbers that the counts of all segments may take.
    """
    wanted = min(-(-_PROGRAMS // units), -(-length // (4 * _SORTED)), room // (units << BITS))
    return max(1, wanted)


def lists(
    words: Words,
    found: Boxes,
    heads: int,
    first_pair: int,
    pairs: int,
    box: int,
    room_for_counts: Tensor | None = None,
) -> Lists:
    """What some heads compute.

    Args:
        words: of ``[B|1, H|1, L, N]``.
        found: boxes of the keys.
        heads: ``H``.
        first_pair: ``b · H + h`` of the first head.
        pairs: how many.
        box: keys of a box, at most 64.
        room_for_counts: memory that may be written to, of any dtype, contiguous.
    """
    _, _, length, blocks = words.shape
    groups, size = grouping(blocks)
    rows = triton.cdiv(length, ROWS)
    units, padded = pairs * groups, rows * ROWS
    device = words.word.device

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    given = None if room_for_counts is None else room_for_counts.view(-1).view(torch.int32)
    segments = segments_of(units, length, units << BITS if given is None else given.numel())
    needed = units * segments << BITS
    bins = room(needed) if given is None or given.numel() < needed else given[:needed]
    bins.zero_()
    where = (heads, length, groups, first_pair, *lead_strides(words.word))
    run = triton.cdiv(triton.cdiv(length, segments), _SORTED) * _SORTED
    _count[(triton.cdiv(length, _COUNTED), units)](
        words.word, bins, *where, run, segments, BT=_COUNTED, num_warps=4
    )
    token, word = room(units, padded), room(units, padded, dtype=torch.int16)
    place, count = room(units, length), room(units)
    _starts[(units,)](bins, count, segments, BT=_SCANNED, num_warps=8)
    heads_first = (heads, length, padded, groups, first_pair, *lead_strides(words.word), run)
    _sort[(segments, units)](
        words.word,
        bins,
        token,
        word,
        place,
        *heads_first,
        BT=_SORTED,
        SHIFT=_SORTED.bit_length() - 1,
        num_warps=2,
    )
    first = torch.nn.functional.pad(
        ((count + ROWS - 1) // ROWS).cumsum(0, dtype=torch.int32), (1, 0)
    )
    item = room(units * rows, ITEM)
    total = found.tiles.span.shape[-1]
    listed = room(pairs * rows * (total + groups * AHEAD))
    _pack[(rows, units)](
        word,
        count,
        first,
        found.tiles.block,
        found.tiles.span,
        found.start,
        item,
        listed,
        heads,
        padded,
        groups,
        size,
        first_pair,
        rows,
        total,
        *lead_strides(found.tiles.span),
        *lead_strides(found.start),
        BOX=box,
        BM=ROWS,
        CHUNK=_CHUNK,
        num_warps=4,
    )
    return Lists(token, word, place, first, item, listed)


def specimens() -> list[Specimen]:
    """The kernels as they are launched."""
    words = dict.fromkeys(("word_ptr", "sorted_ptr"), "*i16")
    names = ("bin", "token", "place", "count", "first", "block", "span", "start", "item", "list")
    types = {**words, **{f"{name}_ptr": "*i32" for name in names}, "select_ptr": "*i1"}
    launches: list[tuple[Any, dict[str, Any], int]] = [
        (_words, {"BT": 128, "BG": 2}, 4),
        (_count, {"BT": _COUNTED}, 4),
        (_starts, {"BT": _SCANNED}, 8),
        (_sort, {"BT": _SORTED, "SHIFT": _SORTED.bit_length() - 1}, 2),
        (_pack, {"BOX": 16, "BM": ROWS, "CHUNK": _CHUNK}, 4),
    ]
    return [
        Specimen(
            kernel.__name__,
            kernel,
            typed(kernel, constants, **types),
            constants,
            {"num_warps": warps},
        )
        for kernel, constants, warps in launches
    ]
