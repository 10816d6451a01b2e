"""The cut from sums and counts of gates: one program a head, in place of many small launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.token_select.gates import TOP


@triton.jit(do_not_specialize=["size"])
def split_kernel(x_ptr, mean_ptr, fine_ptr, size, BT: tl.constexpr):
    """Numbers in fp32 as two of fewer bits: what they round to, and what is left."""
    where = tl.program_id(0) * BT + tl.arange(0, BT)
    x = tl.load(x_ptr + where, mask=where < size, other=0.0)
    mean = x.to(mean_ptr.dtype.element_ty)
    tl.store(mean_ptr + where, mean, mask=where < size)
    fine = (x - mean.to(tl.float32)).to(fine_ptr.dtype.element_ty)
    tl.store(fine_ptr + where, fine, mask=where < size)


@triton.jit(do_not_specialize=["tiles"])
def scale_kernel(low_ptr, high_ptr, done_ptr, scale_ptr, least_ptr, tiles, margin,
                 BT: tl.constexpr):  # fmt: skip
    """What a gate of 0 is and what a gate is multiplied by, from the ends of all tiles; and which
    number the least one is. ``margin`` is left on both sides, as a share of the range."""
    pair = tl.program_id(0).to(tl.int64)
    if tl.load(done_ptr + pair) != 0:
        return
    low = tl.full([BT], float("inf"), tl.float32)
    high = tl.full([BT], float("-inf"), tl.float32)
    for first in range(0, tiles, BT):
        tile = first + tl.arange(0, BT)
        where = pair * tiles + tile
        low = tl.minimum(low, tl.load(low_ptr + where, mask=tile < tiles, other=float("inf")))
        high = tl.maximum(high, tl.load(high_ptr + where, mask=tile < tiles, other=float("-inf")))
    low, span = tl.min(low, 0), tl.max(high, 0) - tl.min(low, 0)
    some = span > 0
    scale = tl.where(some, TOP / (tl.where(some, span, 1.0) * (1 + 2 * margin)), 0.0)
    tl.store(scale_ptr + 2 * pair, tl.where(some, low - margin * span, 0.0))
    tl.store(scale_ptr + 2 * pair + 1, scale)
    least = tl.where(some, margin * span * scale + 0.5, 0.0)
    tl.store(least_ptr + pair, least.to(tl.int64))


@triton.jit
def summed_kernel(count_ptr, base_ptr, done_ptr, sum_ptr, CHUNK: tl.constexpr):
    """Sums of consecutive values, each as often as it was counted, and how many they are."""
    pair, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    if tl.load(done_ptr + pair) != 0:
        return
    value = part * CHUNK + tl.arange(0, CHUNK)
    number = tl.load(count_ptr + pair * tl.num_programs(0) * CHUNK + value).to(tl.int64)
    at = sum_ptr + (pair * tl.num_programs(0) + part) * 2
    tl.store(at, tl.sum(number * (value + tl.load(base_ptr + pair)), 0))
    tl.store(at + 1, tl.sum(number, 0))


@triton.jit
def _wanted(total, share_ptr, COUNT: tl.constexpr):
    """What must be reached, fp64, of a sum or of a number of pairs."""
    share = total.to(tl.float64) * tl.load(share_ptr)
    if COUNT:
        share = tl.maximum(tl.floor(share + 1e-9), 1.0)
    return share


@triton.jit
def _boundary(sums, lane, have, wanted, N: tl.constexpr):
    """In which of the first ``N`` bins, from the last one down, enough is reached.

    ``N`` if there is enough before; and what there is before that bin.
    """
    above = tl.sum(sums, 0) - tl.cumsum(sums, 0) + have
    needs = (above.to(tl.float64) < wanted) & (lane < N)
    number = N - tl.sum(needs.to(tl.int32), 0)
    before = tl.sum(tl.where(lane == number, above, 0), 0)
    return number, tl.where(number < N, before, have)


@triton.jit(do_not_specialize=["tiles", "shift", "ahead"])
def digit_kernel(sum_ptr, share_ptr, done_ptr, base_ptr, have_ptr, wanted_ptr, tiles, shift, ahead,
           COUNT: tl.constexpr, FIRST: tl.constexpr, BINS: tl.constexpr,
           BT: tl.constexpr):  # fmt: skip
    """The next digit of the cut, from the sums of all tiles; and how far values go on from there
    before those that are counted begin."""
    pair = tl.program_id(0).to(tl.int64)
    if tl.load(done_ptr + pair) != 0:
        return
    lane = tl.arange(0, 2 * BINS)
    sums = tl.zeros([BT, 2 * BINS], tl.int64)
    for first in range(0, tiles, BT):
        tile = first + tl.arange(0, BT)
        where = (pair * tiles + tile)[:, None] * 2 * BINS + lane[None, :]
        sums += tl.load(sum_ptr + where, mask=(tile < tiles)[:, None], other=0)
    found = tl.sum(sums, 0)
    if FIRST:
        have = tl.sum(tl.where(lane == BINS + 1, found, 0), 0)
        wanted = _wanted(tl.sum(tl.where(lane == BINS, found, 0), 0), share_ptr, COUNT)
        tl.store(wanted_ptr + pair, wanted)
    else:
        have, wanted = tl.load(have_ptr + pair), tl.load(wanted_ptr + pair)
    digit, have = _boundary(tl.where(lane < BINS, found, 0), lane, have, wanted, BINS)
    base = digit.to(tl.int64) << shift
    if not FIRST:
        base += tl.load(base_ptr + pair)
    tl.store(base_ptr + pair, tl.maximum(base + ahead, 0))
    tl.store(have_ptr + pair, have)


@triton.jit(do_not_specialize=["tiles", "every"])
def cut_kernel(
    count_ptr, summed_ptr, base_ptr, sum_ptr, share_ptr, have_ptr, wanted_ptr, done_ptr,
    cut_ptr, needed_ptr, tiles, every,
    COUNT: tl.constexpr, GUESSED: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """The smallest gate that is selected, and how many of its equals.

    Where the values that were counted lie at a guess, it is done only if the cut is among them, and
    if no gate lies where numbers end. The worth of a gate is how far it is above the least one.
    """
    pair = tl.program_id(0).to(tl.int64)
    if tl.load(done_ptr + pair) != 0:
        return
    if GUESSED:
        lane = tl.arange(0, 8)
        sums = tl.zeros([BT, 8], tl.int64)
        ends = tl.full([BT, 8], TOP // 2, tl.int64)
        for first in range(0, tiles, BT):
            tile = first + tl.arange(0, BT)
            where = (pair * tiles + tile)[:, None] * 8 + lane[None, :]
            read = tl.load(sum_ptr + where, mask=(tile < tiles)[:, None], other=0)
            sums += read
            read = tl.where((tile < tiles)[:, None], read, TOP // 2)
            ends = tl.where((lane == 6)[None, :], tl.minimum(ends, read), tl.maximum(ends, read))
        found = tl.sum(sums, 0)
        least = tl.sum(tl.where(lane == 6, tl.min(ends, 0), 0), 0)
        most = tl.sum(tl.where(lane == 7, tl.max(ends, 0), 0), 0)
        every = tl.sum(tl.where(lane == 0, found, 0), 0)
        count = tl.sum(tl.where(lane == 3, found, 0), 0)
        have = tl.sum(tl.where((lane == 1) | (lane == 2), found, 0), 0)
        have_count = tl.sum(tl.where((lane == 4) | (lane == 5), found, 0), 0)
        if (least <= 0) | (most >= TOP):
            return
        have = have_count if COUNT else have - least * have_count
        wanted = _wanted(count if COUNT else every - least * count, share_ptr, COUNT)
    else:
        have, wanted = tl.load(have_ptr + pair), tl.load(wanted_ptr + pair)
        least = tl.full([], 0, tl.int64)
    base = tl.load(base_ptr + pair)
    number = tl.arange(0, PARTS)
    summed = tl.load(summed_ptr + (pair * PARTS + number) * 2 + 1)
    if not COUNT:
        summed = tl.load(summed_ptr + (pair * PARTS + number) * 2) - least * summed
    enough = (have + tl.sum(summed, 0)).to(tl.float64) >= wanted
    part, have = _boundary(summed, number, have, wanted, PARTS)
    if GUESSED and ((part == PARTS) | ((enough == 0) & (base > 0))):
        return
    value = tl.arange(0, CHUNK)
    some = tl.minimum(part, PARTS - 1)
    first = base + some * CHUNK
    counts = tl.load(count_ptr + (pair * PARTS + some) * CHUNK + value).to(tl.int64)
    worth = counts if COUNT else counts * (first + value - least)
    digit, have = _boundary(worth, value, have, wanted, CHUNK)
    cut = first + digit
    # of those that equal the cut, as many as are reached before there is enough
    each = (tl.full([], 1, tl.int64) if COUNT else cut - least).to(tl.float64)
    needed = tl.ceil((wanted - have) / tl.maximum(each, 1.0))
    needed = tl.where(each > 0, needed, every.to(tl.float64))
    needed = tl.where((part < PARTS) & (digit < CHUNK), needed, 0.0)
    tl.store(cut_ptr + pair, cut)
    tl.store(needed_ptr + pair, needed.to(tl.int64))
    if GUESSED:
        tl.store(done_ptr + pair, 1)


class State(NamedTuple):
    """What is known of the cut, by head ``[P]`` or longer; ``share`` and ``zero`` stay."""

    base: Tensor  # int64, where the values begin that are looked at
    have: Tensor  # int64, of what is above them and of own blocks
    cut: Tensor  # int64
    needed: Tensor  # int64
    zero: Tensor  # int64
    least: Tensor  # int64, the number of the least gate that was looked at
    scale: Tensor  # fp32, the gate that is 0, and what gates are multiplied by
    done: Tensor  # int32
    wanted: Tensor  # fp64
    share: Tensor  # fp64 [1], the threshold
    around: Tensor  # int32, how many gates there are of each value around a guess
    tail: Tensor  # int32, of each value after the first digits

    @classmethod
    def of(
        cls, pairs: int, threshold: float, around: int, tail: int, device: torch.device
    ) -> State:
        """All zero, with ``2 ** around`` and ``2 ** tail`` values for each head."""
        # cleared together, which is one launch, and each where 16 bytes begin
        some = -(-pairs // 4) * 4
        sizes = (*(2 * some,) * 7, some, pairs << around, pairs << tail)
        parts = torch.zeros(sum(sizes), dtype=torch.int32, device=device).split(sizes)
        base, have, cut, needed, zero, least = (part.view(torch.int64) for part in parts[:6])
        scale, done = parts[6].view(torch.float32).view(-1, 2), parts[7]
        wanted = torch.empty(pairs, dtype=torch.float64, device=device)
        share = torch.full((1,), threshold, dtype=torch.float64, device=device)
        known = base, have, cut, needed, zero, least
        return cls(*known, scale, done, wanted, share, parts[8], parts[9])
