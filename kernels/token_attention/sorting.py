"""The tokens of every group of blocks in the order of what they chose of it.

Sorted by a word's place in the Gray code, by counting: every word has a bin. A unit, a head and a
group, is cut into segments that are sorted at once; those of one word stay in their order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.scan import larger
from dit_accel.kernels.specimen import Specimen, typed
from dit_accel.kernels.word_bits import word_bit
from dit_accel.kernels.words import BITS, Words, grouping

_SORTED, _SORTED_BY_FEW = 512, 2048
"""Tokens that are sorted together."""
_PROGRAMS = 1500
"""Programs that sort at once, so that each does not wait for itself alone."""
_COUNTED = 1024
"""Tokens whose words are counted by a program."""
_SCANNED = 4096
"""Words whose tokens are added up together."""
_BINS = tl.constexpr(1 << BITS)


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
    # neighbours are of other units, since the tokens of one often have one word
    unit = tl.program_id(0)
    word_ptr = _words_of(word_ptr, unit, heads, length, groups, first_pair, word_b, word_h)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    word = tl.load(word_ptr + token, mask=token < length, other=0).to(tl.int32) & 0xFFFF
    bins = (unit.to(tl.int64) * segments + token // run) * _BINS + _code_of(word)
    tl.atomic_add(bin_ptr + bins, 1, mask=word != 0, sem="relaxed")


@triton.jit(do_not_specialize=["segments"])
def _sums(bin_ptr, sum_ptr, segments, BT: tl.constexpr):
    """How many tokens have one of some words, in all segments."""
    unit = tl.program_id(1).to(tl.int64)
    bin_ptr += unit * segments * _BINS + tl.program_id(0) * BT + tl.arange(0, BT)
    number = tl.zeros([BT], tl.int32)
    for segment in range(segments):
        number += tl.load(bin_ptr + segment * _BINS)
    tl.store(sum_ptr + unit * tl.num_programs(0) + tl.program_id(0), tl.sum(number, 0))


@triton.jit(do_not_specialize=["segments"])
def _starts(bin_ptr, sum_ptr, count_ptr, segments, PARTS: tl.constexpr, BT: tl.constexpr):
    """Where the tokens of each word and segment begin, from how many there are."""
    unit = tl.program_id(1).to(tl.int64)
    part = tl.arange(0, PARTS)
    sums = tl.load(sum_ptr + unit * PARTS + part)
    before = tl.sum(tl.where(part < tl.program_id(0), sums, 0), 0)
    if tl.program_id(0) == 0:
        tl.store(count_ptr + unit, tl.sum(sums, 0))
    bin_ptr += unit * segments * _BINS + tl.program_id(0) * BT + tl.arange(0, BT)
    number = tl.zeros([BT], tl.int32)
    for segment in range(segments):
        number += tl.load(bin_ptr + segment * _BINS)
    start = before + tl.cumsum(number, 0) - number
    for segment in range(segments):
        at = bin_ptr + segment * _BINS
        here = tl.load(at)
        tl.store(at, start)
        start += here


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
        rank = lane - tl.associative_scan(start, 0, larger)
        place = tl.load(bin_ptr + code, mask=some, other=0) + rank
        tl.debug_barrier()
        last = some & ((lane == BT - 1) | (behind != code))
        tl.store(bin_ptr + code, place + 1, mask=last)
        tl.store(token_ptr + place, token, mask=some)
        tl.store(sorted_ptr + place, (code ^ (code >> 1)).to(tl.int16), mask=some)
        tl.store(place_ptr + token, place, mask=some)
        tl.debug_barrier()


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


def segments_of(units: int, length: int, room: int) -> int:
    """Into how many segments a unit's tokens are cut, each of them sorted by a program.

    Args:
        units: of all heads that are sorted together.
        length: tokens.
        room: numbers that the counts of all segments may take.
    """
    wanted = min(-(-_PROGRAMS // units), -(-length // (4 * _SORTED)), room // (units << BITS))
    return max(1, wanted)


class Sorted(NamedTuple):
    """``token`` int32 and ``word`` int16 ``[U, padded]``; ``place`` int32 ``[U, L]``, where each
    token is, or -1; ``counts`` int32 ``[U]``, tokens that chose something."""

    token: Tensor
    word: Tensor
    place: Tensor
    counts: Tensor


def sort(
    words: Words,
    heads: int,
    first_pair: int,
    pairs: int,
    padded: int,
    room_for_counts: Tensor | None = None,
) -> Sorted:
    """Sort the tokens of some heads.

    Args:
        words: of ``[B|1, H|1, L, N]``.
        heads: ``H``.
        first_pair: ``b · H + h`` of the first head.
        pairs: how many.
        padded: room for a unit's tokens.
        room_for_counts: memory that may be written to, of any dtype, contiguous.
    """
    length = words.shape[2]
    groups, _ = grouping(words.blocks)
    units = pairs * groups
    device = words.word.device

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    given = None if room_for_counts is None else room_for_counts.view(-1).view(torch.int32)
    segments = segments_of(units, length, units << BITS if given is None else given.numel())
    needed = units * segments << BITS
    bins = room(needed) if given is None or given.numel() < needed else given[:needed]
    bins.zero_()
    where = (heads, length, groups, first_pair, *lead_strides(words.word))
    # few programs take many tokens at once, since they do not fill the processors
    some, warps = (_SORTED, 2) if segments * units >= _PROGRAMS else (_SORTED_BY_FEW, 8)
    run = triton.cdiv(triton.cdiv(length, segments), some) * some
    launch(
        _count,
        (units, triton.cdiv(length, _COUNTED)),
        (words.word, bins),
        (*where, run, segments),
        BT=_COUNTED,
        num_warps=4,
    )
    token, word = room(units, padded), room(units, padded, dtype=torch.int16)
    place, count = room(units, length), room(units)
    parts = (1 << BITS) // _SCANNED
    sums = room(units, parts)
    launch(_sums, (parts, units), (bins, sums), (segments,), BT=_SCANNED, num_warps=8)
    launch(
        _starts,
        (parts, units),
        (bins, sums, count),
        (segments,),
        PARTS=parts,
        BT=_SCANNED,
        num_warps=8,
    )
    launch(
        _sort,
        (segments, units),
        (words.word, bins, token, word, place),
        (heads, length, padded, *where[2:], run),
        BT=some,
        SHIFT=some.bit_length() - 1,
        num_warps=warps,
    )
    return Sorted(token, word, place, count)


def specimens() -> list[Specimen]:
    """The kernels as they are launched."""
    types = {
        **dict.fromkeys(("word_ptr", "sorted_ptr"), "*i16"),
        **{f"{name}_ptr": "*i32" for name in ("bin", "sum", "token", "place", "count")},
        "select_ptr": "*i1",
    }
    launches: list[tuple[Any, dict[str, Any], int]] = [
        (_words, {"BT": 128, "BG": 2}, 4),
        (_count, {"BT": _COUNTED}, 4),
        (_sums, {"BT": _SCANNED}, 8),
        (_starts, {"PARTS": (1 << BITS) // _SCANNED, "BT": _SCANNED}, 8),
        *(
            (_sort, {"BT": some, "SHIFT": some.bit_length() - 1}, warps)
            for some, warps in ((_SORTED, 2), (_SORTED_BY_FEW, 8))
        ),
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
