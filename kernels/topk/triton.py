"""The choice as a kernel: the smallest entry that is taken is found bit by bit, nothing sorted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.specimen import Specimen


@triton.jit(do_not_specialize=["rows", "width"])
def topk_kernel(score, wanted, mask, rows, width, BLOCK: tl.constexpr):
    row, head = tl.program_id(0), tl.program_id(1)
    at = (head.to(tl.int64) * rows + row) * width
    place = tl.arange(0, BLOCK)
    value = tl.load(score + at + place, mask=place < width, other=float("-inf"))
    finite = value > float("-inf")
    count = tl.minimum(tl.load(wanted + head).to(tl.int32), tl.sum(finite.to(tl.int32), 0))
    # floats in their own order as unsigned numbers; zeros of both signs are equal
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (key.to(tl.int64) + 2147483648).to(tl.uint32)
    least = tl.zeros([1], tl.uint32)
    for step in tl.static_range(32):
        more = least | (1 << (31 - step))
        enough = tl.sum((key >= more).to(tl.int32), 0) >= count
        least = tl.where(enough, more, least)
    above = finite & (key > least)
    equal = finite & (key == least)
    left = count - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    tl.store(mask + at + place, chosen.to(tl.int8), mask=place < width)


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
