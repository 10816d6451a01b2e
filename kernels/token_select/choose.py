"""What is above the cut, as words: the last pass over the gates."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.token_select.gates import TOP, gates, own_range, tokens, values
from dit_accel.kernels.word_bits import word_bit

_SIZES = ["heads", "length", "blocks", "columns", "start", "stop", "groups", "size"]


@triton.jit
def _columns(first, size, blocks, BN: tl.constexpr):
    """Blocks of some groups, sixteen lanes each; which exist; the value of their bits."""
    lane = tl.arange(0, BN)
    number = lane % 16
    column = (first + lane // 16) * size + number
    return (
        column,
        (number < size) & (column < blocks),
        tl.full([BN], 1, tl.int32) << word_bit(number),
    )


@triton.jit
def _words(taken, worth, BM: tl.constexpr, BN: tl.constexpr):
    bits = tl.where(taken, worth[None, :], 0)
    return tl.sum(tl.reshape(bits, [BM, BN // 16, 16]), 2)


@triton.jit
def _bits(word):
    """How many bits of 16 are set."""
    word = word - ((word >> 1) & 0x5555)
    word = (word & 0x3333) + ((word >> 2) & 0x3333)
    word = (word + (word >> 4)) & 0x0F0F
    return (word + (word >> 8)) & 0x1F


@triton.jit(do_not_specialize=_SIZES)
def select_kernel(
    q_ptr, mean_ptr, fine_ptr, full_ptr, own_ptr, scale_ptr, base_ptr, tie_ptr, word_ptr,
    q_b, q_h, q_l, full_b, full_h, own_b, own_h,
    heads, length, blocks, columns, start, stop, groups, size,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What is above the cut, text and own blocks; how many gates of a tile equal the cut."""
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    token, there, query = tokens(q_ptr + b * q_b + h * q_h, q_l, start, stop, length, 1, D, BM)
    own = tl.load(own_ptr + b * own_b + h * own_h + token, mask=there, other=-1).to(tl.int32)
    mean_ptr += pair * blocks * D
    fine_ptr += pair * blocks * D
    full_ptr += b * full_b + h * full_h
    low, scale = tl.load(scale_ptr + 2 * pair), tl.load(scale_ptr + 2 * pair + 1)
    cut = tl.load(base_ptr + pair).to(tl.int32)
    # as numbers that end at 0 and at the top compare
    equal = tl.where(cut > 0, cut.to(tl.float32), float("-inf"))
    larger = tl.where(cut < TOP, (cut + 1).to(tl.float32), float("inf"))
    ties = tl.zeros([BM, BN // 16], tl.int32)
    lowest, highest = own_range(there, own, full_ptr, columns)
    for first in range(0, groups, BN // 16):
        column, inside, worth = _columns(first, size, blocks, BN)
        _gate, value = values(query, mean_ptr, fine_ptr, column, inside, low, scale, D, SPLIT)
        begin, end = first * size, (first + BN // 16) * size
        if (end <= columns) & ((highest < begin) | (lowest >= end)):
            worth = tl.where(inside, worth, 0)
            word = _words(value >= larger, worth, BM, BN)
            tie = _words(value >= equal, worth, BM, BN) ^ word
        else:
            mine = column[None, :] == own[:, None]
            full = tl.load(full_ptr + column, mask=inside, other=0) != 0
            can = there[:, None] & (full & (column < columns))[None, :]
            # text selects everything, and everything selects text
            text = (column >= columns)[None, :] | (there[:, None] == 0)
            taken = ((can & (value >= larger)) | mine | text) & inside[None, :]
            word = _words(taken, worth, BM, BN)
            tie = can & (mine == 0) & (value >= equal) & (value < larger) & inside[None, :]
            tie = _words(tie, worth, BM, BN)
        ties += _bits(tie)
        group = first + tl.arange(0, BN // 16)
        where = (pair * groups + group)[None, :] * length + token[:, None]
        mask = (token < length)[:, None] & (group < groups)[None, :]
        tl.store(word_ptr + where, word.to(tl.int16), mask=mask)
    tl.store(tie_ptr + pair * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(ties, 1), 0))


@triton.jit(do_not_specialize=_SIZES)
def settle_kernel(
    q_ptr, mean_ptr, fine_ptr, full_ptr, own_ptr, scale_ptr, base_ptr, tie_ptr, room_ptr, word_ptr,
    q_b, q_h, q_l, full_b, full_h, own_b, own_h,
    heads, length, blocks, columns, start, stop, groups, size,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Of the gates that equal the cut, as many as there is room for, the first ones."""
    pair = tl.program_id(1).to(tl.int64)
    where = pair * tl.num_programs(0) + tl.program_id(0)
    count = tl.load(tie_ptr + where)
    if count == 0:
        return
    # of the tiles before this one
    earlier = tl.zeros([128], tl.int64)
    for first in range(0, tl.program_id(0), 128):
        tile = first + tl.arange(0, 128)
        at = pair * tl.num_programs(0) + tile
        earlier += tl.load(tie_ptr + at, mask=tile < tl.program_id(0), other=0).to(tl.int64)
    before, room = tl.sum(earlier, 0), tl.load(room_ptr + pair)
    if before >= room:
        return
    b, h = pair // heads, pair % heads
    token, there, query = tokens(q_ptr + b * q_b + h * q_h, q_l, start, stop, length, 1, D, BM)
    own = tl.load(own_ptr + b * own_b + h * own_h + token, mask=there, other=-1).to(tl.int32)
    mean_ptr += pair * blocks * D
    fine_ptr += pair * blocks * D
    full_ptr += b * full_b + h * full_h
    low, scale = tl.load(scale_ptr + 2 * pair), tl.load(scale_ptr + 2 * pair + 1)
    cut = tl.load(base_ptr + pair).to(tl.int32)
    rank = tl.zeros([BM], tl.int64)
    # where there is room for all of them, none has to be counted
    counted = tl.where(before + count > room, groups, 0)
    for part in tl.static_range(2):
        ties = tl.zeros([BM], tl.int32)
        for first in range(0, counted if part == 0 else groups, BN // 16):
            column, inside, worth = _columns(first, size, blocks, BN)
            _gate, number, full = gates(
                query, mean_ptr, fine_ptr, full_ptr, column, inside, low, scale, D, SPLIT
            )
            can = there[:, None] & (inside & full & (column < columns))[None, :]
            tie = (can & (column[None, :] != own[:, None]) & (number == cut)).to(tl.int32)
            if part == 1:
                place = (rank + ties)[:, None] + tl.cumsum(tie, 1) - tie
                added = _words((tie > 0) & (place < room), worth, BM, BN)
                group = first + tl.arange(0, BN // 16)
                target = word_ptr + (pair * groups + group)[None, :] * length + token[:, None]
                mask = there[:, None] & (group < groups)[None, :] & (added != 0)
                known = tl.load(target, mask=mask, other=0).to(tl.int32)
                tl.store(target, (known | added).to(tl.int16), mask=mask)
            ties += tl.sum(tie, 1)
        if part == 0:
            rank = before + tl.cumsum(ties, 0) - ties
