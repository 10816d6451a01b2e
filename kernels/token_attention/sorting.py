"""The tokens of every group of blocks in the order of what they chose of it.

Sorted by a word's place in the Gray code, digit by digit from the last one, four bits each: those
of one digit stay in the order that they had. A unit is a head and a group; its tokens are cut into
tiles, which count their digits apart and then know where each of theirs goes. How many came before
a token with the same digit is a running sum, of four digits in one number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, alike
from dit_accel.kernels.word_bits import word_bit
from dit_accel.kernels.words import BITS, Words, grouping

_ROWS = 256
"""Rows of tokens that a program moves, ..."""
_EACH = 8
"""... and tokens of a row, fewer than four bits count."""
_WARPS = 4
_TILES = 32
"""Tiles whose digits are added up together."""
_SIZES = ["heads", "length", "padded", "groups", "first_pair", "word_b", "word_h", "shift", "each"]


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


@triton.jit
def _code(word_ptr, key_ptr, place, there, FIRST: tl.constexpr):
    """Codes of some tokens as the pass before left them, and which tokens there are."""
    if FIRST:
        word = tl.load(word_ptr + place, mask=there, other=0).to(tl.int32) & 0xFFFF
        code = _code_of(word)
        there = there & (word != 0)
    else:
        code = tl.load(key_ptr + place, mask=there, other=0).to(tl.int32) & 0xFFFF
    return code, there


@triton.jit
def _one(code, there, shift):
    """A one where a token's digit has its four bits of 64, and where that is."""
    at = (((code >> shift) & 15) << 2).to(tl.int64)
    return tl.where(there, tl.full(at.shape, 1, tl.int64) << at, 0), at


@triton.jit
def _spread(counts, part: tl.constexpr):
    """Four digits' counts, of four bits each, with sixteen bits each."""
    some = (counts >> (16 * part)) & 0xFFFF
    some = (some | (some << 24)) & 0x000000FF000000FF
    return (some | (some << 12)) & 0x000F000F000F000F


@triton.jit
def _counts_of(word_ptr, key_ptr, place, end, shift, each, FIRST: tl.constexpr):
    """How many of a row's tokens have each digit, four bits for each."""
    counts = tl.zeros(place.shape, tl.int64)
    for i in range(each):  # no constant, and not unrolled: what is run once must be fetched
        code, there = _code(word_ptr, key_ptr, place + i, place + i < end, FIRST)
        one, _at = _one(code, there, shift)
        counts += one
    return counts


@triton.jit(do_not_specialize=_SIZES)
def _count(
    word_ptr, key_ptr, total_ptr, bin_ptr,
    heads, length, padded, groups, first_pair, word_b, word_h, shift, each,
    FIRST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """How many tokens of a tile have each digit."""
    tile, unit = tl.program_id(0), tl.program_id(1)
    end = length if FIRST else tl.load(total_ptr + unit)
    lane = tl.arange(0, 16)
    where = (unit.to(tl.int64) * tl.num_programs(0) + tile) * 16 + lane
    if tile * ROWS * each >= end:
        tl.store(bin_ptr + where, tl.zeros([16], tl.int32))
        return
    word_ptr = _words_of(word_ptr, unit, heads, length, groups, first_pair, word_b, word_h)
    key_ptr += unit.to(tl.int64) * padded
    place = (tile * ROWS + tl.arange(0, ROWS)) * each
    counts = _counts_of(word_ptr, key_ptr, place, end, shift, each, FIRST)
    found = tl.zeros([16], tl.int64)
    for part in tl.static_range(4):
        found = tl.where((lane >> 2) == part, tl.sum(_spread(counts, part), 0), found)
    number = (found >> ((lane & 3) << 4).to(tl.int64)) & 0xFFFF
    tl.store(bin_ptr + where, number.to(tl.int32))


@triton.jit(do_not_specialize=_SIZES)
def _move(
    word_ptr, key_ptr, token_ptr, total_ptr, bin_ptr, start_ptr, key_out, token_out, place_ptr,
    heads, length, padded, groups, first_pair, word_b, word_h, shift, each,
    FIRST: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """The tokens of a tile to where those of their digit go, in the order that they had."""
    tile, unit = tl.program_id(0), tl.program_id(1)
    end = length if FIRST else tl.load(total_ptr + unit)
    if tile * ROWS * each >= end:
        return
    # where those of each digit begin, behind those of smaller ones and of tiles before this one
    lane = tl.arange(0, 16)
    total, before = tl.zeros([16], tl.int32), tl.zeros([16], tl.int32)
    row = unit.to(tl.int64) * tl.num_programs(0)
    for first in range(0, tl.num_programs(0), TILES):
        other = first + tl.arange(0, TILES)
        here = (other < tl.num_programs(0))[:, None]
        where = (row + other)[:, None] * 16 + lane[None, :]
        number = tl.load(bin_ptr + where, mask=here, other=0)
        total += tl.sum(number, 0)
        before += tl.sum(tl.where((other < tile)[:, None], number, 0), 0)
    start_ptr += (row + tile) * 16
    tl.store(start_ptr + lane, tl.cumsum(total, 0) - total + before)
    if FIRST and tile == 0:
        tl.store(total_ptr + unit, tl.sum(total, 0))
    word_ptr = _words_of(word_ptr, unit, heads, length, groups, first_pair, word_b, word_h)
    key_ptr += unit.to(tl.int64) * padded
    token_ptr += unit.to(tl.int64) * padded
    key_out += unit.to(tl.int64) * padded
    token_out += unit.to(tl.int64) * padded
    place_ptr += unit.to(tl.int64) * length
    place = (tile * ROWS + tl.arange(0, ROWS)) * each
    counts = _counts_of(word_ptr, key_ptr, place, end, shift, each, FIRST)
    ranks_0, ranks_1 = _spread(counts, 0), _spread(counts, 1)
    ranks_2, ranks_3 = _spread(counts, 2), _spread(counts, 3)
    ranks_0 = tl.cumsum(ranks_0, 0) - ranks_0
    ranks_1 = tl.cumsum(ranks_1, 0) - ranks_1
    ranks_2 = tl.cumsum(ranks_2, 0) - ranks_2
    ranks_3 = tl.cumsum(ranks_3, 0) - ranks_3
    tl.debug_barrier()
    counts = tl.zeros([ROWS], tl.int64)
    for i in range(each):
        within = place + i < end
        code, there = _code(word_ptr, key_ptr, place + i, within, FIRST)
        one, at = _one(code, there, shift)
        digit = (code >> shift) & 15
        low = tl.where((digit & 4) == 0, ranks_0, ranks_1)
        high = tl.where((digit & 4) == 0, ranks_2, ranks_3)
        ranks = tl.where((digit & 8) == 0, low, high) >> ((digit & 3) << 4).to(tl.int64)
        rank = (ranks & 0xFFFF).to(tl.int32) + ((counts >> at) & 15).to(tl.int32)
        counts += one
        goes = tl.load(start_ptr + digit, mask=there, other=0) + rank
        token = place + i if FIRST else tl.load(token_ptr + place + i, mask=there, other=0)
        tl.store(token_out + goes, token, mask=there)
        tl.store(key_out + goes, (code ^ (code >> 1) if LAST else code).to(tl.int16), mask=there)
        if FIRST:
            none = within & (there == 0)
            tl.store(place_ptr + place + i, tl.full([ROWS], -1, tl.int32), mask=none)
        if LAST:
            tl.store(place_ptr + token, goes, mask=there)


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
    scratch: Tensor | None = None,
) -> Sorted:
    """Sort the tokens of some heads.

    Args:
        words: of ``[B|1, H|1, L, N]``.
        heads: ``H``.
        first_pair: ``b · H + h`` of the first head.
        pairs: how many.
        padded: room for a unit's tokens.
        scratch: uint8 ``[...]``, memory that may be written to.
    """
    length = words.shape[2]
    groups, _ = grouping(words.blocks)
    units, tiles = pairs * groups, triton.cdiv(length, _ROWS * _EACH)
    device = words.word.device

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    # tokens and codes between two passes; and for every tile how many have a digit, and where
    # these begin
    sizes = [units * padded * 4, units * padded * 2, units * tiles * 64, units * tiles * 64]
    sizes = [triton.cdiv(size, 16) * 16 for size in sizes]
    if scratch is None or scratch.numel() < sum(sizes):
        scratch = room(sum(sizes), dtype=torch.uint8)
    tokens, codes, bins, starts = scratch[: sum(sizes)].split(sizes)
    one = codes.view(torch.int16), tokens.view(torch.int32)
    other = room(units, padded, dtype=torch.int16), room(units, padded)
    place, count = room(units, length), room(units)
    bins, starts = bins.view(torch.int32), starts.view(torch.int32)
    where = (heads, length, padded, groups, first_pair, *lead_strides(words.word))
    shape = {"ROWS": _ROWS, "num_warps": _WARPS}
    passes = range(0, BITS, 4)
    for shift in passes:
        given, made = (other, one) if shift % 8 == 0 else (one, other)
        first = shift == 0
        launch(
            _count,
            (tiles, units),
            (words.word, given[0], count, bins),
            (*where, shift, _EACH),
            FIRST=first,
            **shape,
        )
        launch(
            _move,
            (tiles, units),
            (words.word, *given, count, bins, starts, *made, place),
            (*where, shift, _EACH),
            FIRST=first,
            LAST=shift == passes[-1],
            TILES=_TILES,
            **shape,
        )
    return Sorted(other[1], other[0], place, count)


def specimens() -> list[Specimen]:
    """The kernels as they are launched."""
    types = {
        **dict.fromkeys(("word_ptr", "key_ptr", "key_out"), "*i16"),
        **{f"{name}_ptr": "*i32" for name in ("bin", "token", "place", "total", "start")},
        "token_out": "*i32",
        "select_ptr": "*i1",
    }
    first = {"FIRST": True, "ROWS": _ROWS}
    later = first | {"FIRST": False}
    launches: list[tuple[Any, dict[str, Any]]] = [
        (_words, {"BT": 128, "BG": 2}),
        (_count, first),
        (_count, later),
        (_move, first | {"LAST": False, "TILES": _TILES}),
        (_move, later | {"LAST": False, "TILES": _TILES}),
        (_move, later | {"LAST": True, "TILES": _TILES}),
    ]
    return alike(launches, types, _WARPS)
