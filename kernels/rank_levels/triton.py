"""Levels by rank as a kernel: for every bound, the last score within it is searched by halves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed

_TINY = tl.constexpr(1.1754943508222875e-38)
_NOTHING = tl.constexpr(-0x7F800001)
"""What stands for -inf among the integers that floats are ordered by."""
_NUMBERS = ["heads", "rows", "width", "whole"]
_NUMBERS += [f"{name}_{axis}" for name in ("worth", "bound", "level") for axis in "bhn"]


@triton.jit
def _fits(above, bound, INCLUSIVE: tl.constexpr):
    return above <= bound if INCLUSIVE else above < bound


@triton.jit
def _above(chosen, unit, COUNTS: tl.constexpr):
    """What some entries are worth, and how many they are."""
    if COUNTS:
        both = tl.sum(tl.where(chosen, unit, 0), 0)
        worth = (both >> 16).to(tl.float32)
        number = both & 0xFFFF
    else:
        worth = tl.sum(tl.where(chosen, unit, 0.0), 0)
        number = tl.sum(chosen.to(tl.int32), 0)
    return worth, number


@triton.jit(do_not_specialize=_NUMBERS)
def rank_kernel(
    score,
    worth,
    bound,
    level,
    heads,
    rows,
    width,
    whole,
    worth_b,
    worth_h,
    worth_n,
    bound_b,
    bound_h,
    bound_n,
    level_b,
    level_h,
    level_n,
    K: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    SHARES: tl.constexpr,
    COUNTS: tl.constexpr,
    CODES: tl.constexpr,
    BEYOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    place = tl.arange(0, BLOCK)
    code = tl.full([BLOCK], BEYOND, tl.int32)
    if row < rows:
        line = (pair * rows + row) * width
        value = tl.load(score + line + place, mask=place < width, other=float("-inf"))
        finite = value > float("-inf")
        at = worth + b * worth_b + h * worth_h + row.to(tl.int64) * worth_n + place
        each = tl.load(at, mask=finite, other=0)
        # floats in their own order as integers; zeros of both signs are equal
        bits = (value + 0.0).to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        top = tl.max(key, 0)
        least = tl.maximum(tl.min(tl.where(finite, key, top), 0) - 1, _NOTHING)
        if COUNTS:
            # how many entries, and above 16 bits how many of them count
            unit = finite.to(tl.int32) + ((finite & (each != 0)).to(tl.int32) << 16)
        else:
            unit = each.to(tl.float32)
        total, every = _above(finite, unit, COUNTS)
        number = tl.zeros([BLOCK], tl.int32)
        limits = bound + b * bound_b + h * bound_h + row.to(tl.int64) * bound_n
        for k in tl.static_range(K):
            limit = tl.load(limits + k)
            if SHARES:
                limit = limit.to(tl.float64) * tl.maximum(total, _TINY).to(tl.float64)
            limit = limit.to(tl.float32)
            # above `low` is too much, above `high` is not; how much, and how many entries
            low = least
            high = top
            above = total * 0.0
            n_low = every
            n_high = every * 0
            if _fits(total, limit, INCLUSIVE):
                high = least
                n_high = every
            elif not _fits(above, limit, INCLUSIVE):
                low = top
                n_low = n_high
            while (low < high - 1) & (n_low - n_high > 1):
                # halfway, whatever the signs
                mid = (low & high) + ((low ^ high) >> 1)
                reach, n_mid = _above(key > mid, unit, COUNTS)
                if _fits(reach, limit, INCLUSIVE):
                    high = mid
                    above = reach
                    n_high = n_mid
                else:
                    low = mid
                    n_low = n_mid
            # of those in between, one alone has room by what is before it, ...
            last = every * 0 + (-1 if INCLUSIVE else BLOCK)
            if n_low - n_high > 1:
                # ... and equal ones are within as long as there is room, in order
                edge = (key > low) & (key <= high)
                last = every * 0 - 1
                first = every * 0 + BLOCK
                while last < first - 1:
                    mid = (last + first) // 2
                    before = edge & (place <= mid if INCLUSIVE else place < mid)
                    reach, n_mid = _above(before, unit, COUNTS)
                    if _fits(above + reach, limit, INCLUSIVE):
                        last = mid
                    else:
                        first = mid
            within = (key > high) | ((key > low) & (place <= last))
            number += within.to(tl.int32)
        found = (tl.full([BLOCK], CODES, tl.int32) >> (4 * number)) & 15
        code = tl.where(place < width, found, code)
    target = level + b * level_b + h * level_h + row.to(tl.int64) * level_n + place
    tl.store(target, code.to(tl.int8), mask=place < whole)


def rank_levels(
    score: Tensor,
    worth: Tensor,
    bounds: Tensor,
    inclusive: bool,
    shares: bool,
    codes: Sequence[int],
    levels: Tensor,
    beyond: int,
) -> None:
    batch, heads, rows, width = score.shape
    score = score.contiguous()
    worth = worth if worth.stride(3) == 1 else worth.contiguous()
    bounds = bounds if bounds.stride(3) == 1 else bounds.contiguous()
    number = bounds.shape[-1]
    block = triton.next_power_of_2(levels.shape[3])
    launch(
        rank_kernel,
        (levels.shape[2], batch * heads),
        (score, worth, bounds, levels),
        (
            *(heads, rows, width, levels.shape[3]),
            *(*lead_strides(worth), worth.stride(2) if worth.shape[2] > 1 else 0),
            *(*lead_strides(bounds), bounds.stride(2) if bounds.shape[2] > 1 else 0),
            *levels.stride()[:3],
        ),
        K=number,
        INCLUSIVE=inclusive,
        SHARES=shares,
        COUNTS=worth.dtype == torch.bool,
        CODES=sum(code << 4 * i for i, code in enumerate(codes)),
        BEYOND=beyond,
        BLOCK=block,
        num_warps=_warps(block),
    )


def _warps(block: int) -> int:
    return 1 if block <= 1024 else 2 if block <= 2048 else 4


def _specimen(block: int, number: int, kind: str) -> Specimen:
    constants = {
        **{"K": number, "INCLUSIVE": kind == "i64", "SHARES": kind != "i64"},
        **{"COUNTS": kind == "i1", "CODES": 0x12480, "BEYOND": 1, "BLOCK": block},
    }
    types = {"score": "*fp32", "worth": f"*{kind}", "bound": "*fp64", "level": "*i8"}
    return Specimen(
        f"levels of {block}, {number} bounds, worth {kind}",
        rank_kernel,
        typed(rank_kernel, constants, **types),
        constants,
        {"num_warps": _warps(block)},
    )


SPECIMENS = (
    [
        _specimen(1024, 1, "i64"),
        *(_specimen(block, 4, kind) for block in (128, 2048, 4096) for kind in ("i1", "fp32")),
    ]
    if isinstance(rank_kernel, triton.JITFunction)
    else []
)
