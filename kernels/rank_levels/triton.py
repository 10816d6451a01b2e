"""Levels by rank as a kernel: for every bound, the last score within it is found bit by bit."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed

_LEAST = tl.constexpr(0x007FFFFF)
"""What stands for -inf among the numbers that floats are ordered by."""


@triton.jit(do_not_specialize=["heads", "rows", "width"])
def _rank(
    score_ptr,
    worth_ptr,
    bound_ptr,
    level_ptr,
    worth_b,
    worth_h,
    worth_n,
    level_b,
    level_h,
    level_n,
    heads,
    rows,
    width,
    K: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    line = pair * rows + row
    place = tl.arange(0, BLOCK)
    inside = place < width
    score = tl.load(score_ptr + line * width + place, mask=inside, other=float("-inf"))
    worth = tl.load(
        worth_ptr + b * worth_b + h * worth_h + row * worth_n + place,
        mask=score > float("-inf"),
        other=0,
    )
    worth = worth.to(tl.float32)
    # floats in their own order as unsigned numbers; zeros of both signs are equal
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (key.to(tl.int64) + 2147483648).to(tl.uint32)
    level = tl.zeros([BLOCK], tl.int32)
    for k in range(0, K):
        bound = tl.load(bound_ptr + line * K + k)
        # the largest number above which there is too much
        beyond = tl.zeros([1], tl.uint32)
        for step in range(0, 32):
            more = beyond | (tl.full([1], 2147483648, tl.uint32) >> step)
            above = tl.sum(tl.where(key > more, worth, 0.0), 0)
            if INCLUSIVE:  # noqa: SIM108
                fits = above <= bound
            else:
                fits = above < bound
            beyond = tl.where(fits, beyond, more)
        # what equals the next number is within as long as there is room, in order
        within = key > tl.maximum(beyond, _LEAST)
        edge = within & (key - 1 == beyond)
        added = tl.where(edge, worth, 0.0)
        reach = tl.sum(tl.where(within & (edge == 0), worth, 0.0), 0) + tl.cumsum(added, 0)
        if INCLUSIVE:  # noqa: SIM108
            fits = reach <= bound
        else:
            fits = reach - added < bound
        level += (within & ((edge == 0) | fits)).to(tl.int32)
    code = (tl.full([BLOCK], CODES, tl.int32) >> (4 * level)) & 15
    where = level_ptr + b * level_b + h * level_h + row.to(tl.int64) * level_n + place
    tl.store(where, code.to(tl.int8), mask=inside)


def rank_levels(
    score: Tensor,
    worth: Tensor,
    bounds: Tensor,
    inclusive: bool,
    codes: Sequence[int],
    levels: Tensor,
) -> None:
    batch, heads, rows, width = score.shape
    score = score.contiguous()
    worth = worth if worth.stride(3) == 1 else worth.contiguous()
    number = bounds.shape[-1]
    bounds = bounds.float().expand(batch, heads, rows, number).contiguous()
    block = triton.next_power_of_2(width)
    _rank[(rows, batch * heads)](
        score,
        worth,
        bounds,
        levels,
        *lead_strides(worth),
        worth.stride(2) if worth.shape[2] > 1 else 0,
        *levels.stride()[:3],
        heads,
        rows,
        width,
        K=number,
        INCLUSIVE=inclusive,
        CODES=sum(code << 4 * i for i, code in enumerate(codes)),
        BLOCK=block,
        num_warps=_warps(block),
    )


def _warps(block: int) -> int:
    return 1 if block <= 256 else 2 if block <= 2048 else 8


def _specimen(block: int, number: int, inclusive: bool) -> Specimen:
    constants = {"K": number, "INCLUSIVE": inclusive, "CODES": 0x43210, "BLOCK": block}
    types = {
        "score_ptr": "*fp32",
        "worth_ptr": "*i64" if inclusive else "*fp32",
        "bound_ptr": "*fp32",
        "level_ptr": "*i8",
    }
    return Specimen(
        f"levels of {block}, {number} bounds",
        _rank,
        typed(_rank, constants, **types),
        constants,
        {"num_warps": _warps(block)},
    )


SPECIMENS = [_specimen(1024, 1, True), _specimen(2048, 4, False), _specimen(4096, 4, False)]
