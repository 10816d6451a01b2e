"""The choice as a kernel: the smallest entry that is taken is found bit by bit, nothing sorted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.specimen import Specimen


@triton.jit
def largest(value, count):
    """The largest so many entries of every row; -inf is none, and of equals the first is taken.

    ``value`` fp32 ``[R, C]``, ``count`` int32 ``[R]``.
    """
    finite = value > float("-inf")
    count = tl.minimum(count, tl.sum(finite.to(tl.int32), 1))
    # floats in their own order as whole numbers; zeros of both signs are equal
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    # the largest number that enough entries reach: its sign first, which turns the order around
    enough = tl.sum((key >= 0).to(tl.int32), 1) >= count
    least = tl.where(enough, 0, -2147483648)
    for step in range(31):  # unrolled it takes seconds to compile, and is no faster
        more = least | (1 << (30 - step))
        enough = tl.sum((key >= more[:, None]).to(tl.int32), 1) >= count
        least = tl.where(enough, more, least)
    above = finite & (key > least[:, None])
    equal = finite & (key == least[:, None])
    left = count - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= left[:, None]))


@triton.jit(do_not_specialize=["rows", "width"])
def topk_kernel(score, wanted, mask, rows, width, BLOCK: tl.constexpr):
    row, head = tl.program_id(0), tl.program_id(1)
    at = (head.to(tl.int64) * rows + row) * width
    place = tl.arange(0, BLOCK)[None, :]
    value = tl.load(score + at + place, mask=place < width, other=float("-inf"))
    count = tl.load(wanted + head + tl.arange(0, 1)).to(tl.int32)
    tl.store(mask + at + place, largest(value, count).to(tl.int8), mask=place < width)


@torch.no_grad()
def topk_mask(score: Tensor, wanted: Tensor) -> Tensor:
    batch, heads, rows, width = score.shape
    score, wanted = score.contiguous(), wanted.contiguous()
    mask = torch.empty(score.shape, dtype=torch.int8, device=score.device)
    block = 1 << (width - 1).bit_length()
    launch(
        topk_kernel,
        (rows, batch * heads),
        (score, wanted, mask),
        (rows, width),
        BLOCK=block,
        num_warps=_warps(block),
    )
    return mask.view(torch.bool)


def _warps(block: int) -> int:
    return 1 if block <= 256 else 4 if block <= 4096 else 8


SPECIMENS = (
    [
        Specimen(
            f"topk of {block}",
            topk_kernel,
            {"score": "*fp32", "wanted": "*i64", "mask": "*i8", "rows": "i32", "width": "i32"},
            {"BLOCK": block},
            {"num_warps": _warps(block)},
        )
        for block in (256, 2048, 16384)
    ]
    if isinstance(topk_kernel, triton.JITFunction)
    else []
)
