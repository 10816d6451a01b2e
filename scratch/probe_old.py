"""The error probe in Triton: one pass over the keys, by chunks of blocks.

Every pair of a row and a block has a peak and a sum of its own, rescaled as its keys go by, so a
program needs no one else's; the peaks of a row meet when all is done. The queries are few and
means, often of thousands: for keys of 16 bits they are split into two numbers of 16 bits, and the
logits are as good as in fp32 at twice the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed

LOG2E = tl.constexpr(1.4426950408889634)
_PROGRAMS = 2048
"""As many programs as keep a large GPU busy, if the blocks can be cut into so many chunks."""


@triton.jit(
    do_not_specialize=["heads", "rows", "blocks", "chunk", "perm_b", "perm_h", "off_b", "off_h"]
)
def _probe(
    q_ptr,
    k_ptr,
    weight_ptr,
    perm_ptr,
    off_ptr,
    valid_ptr,
    sum_ptr,
    peak_ptr,
    k_b,
    k_h,
    k_l,
    weight_b,
    weight_h,
    weight_q,
    perm_b,
    perm_h,
    off_b,
    off_h,
    valid_b,
    scale,
    heads,
    rows,
    blocks,
    chunk,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SPLIT: tl.constexpr,
):
    tiles = tl.cdiv(rows, BM)
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    row = tile * BM + tl.arange(0, BM)
    there = row < rows
    depth = tl.arange(0, D)

    query = tl.load(
        q_ptr + (pair * rows + row[:, None]) * D + depth[None, :], mask=there[:, None], other=0.0
    )
    query = query * (scale * LOG2E)
    coarse = query.to(k_ptr.dtype.element_ty)
    fine = (query - coarse.to(tl.float32)).to(k_ptr.dtype.element_ty)

    k_ptr += b * k_b + h * k_h
    weight_ptr += b * weight_b + h * weight_h
    perm_ptr += b * perm_b + h * perm_h
    off_ptr += b * off_b + h * off_h
    valid_ptr += b * valid_b
    sum_ptr += pair * blocks * rows
    peak_ptr += pair * blocks * rows

    for j in range(part * chunk, tl.minimum(part * chunk + chunk, blocks)):
        start = tl.load(off_ptr + j).to(tl.int32)
        stop = tl.load(off_ptr + j + 1).to(tl.int32)
        weight = tl.load(weight_ptr + row.to(tl.int64) * weight_q + j, mask=there, other=0.0)
        weight = weight.to(tl.float32) * LOG2E
        peak = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        for first in range(start, stop, BN):
            place = first + tl.arange(0, BN)
            keep = place < stop
            token = tl.load(perm_ptr + place, mask=keep, other=0)
            if HAS_VALID:
                keep = keep & (tl.load(valid_ptr + token, mask=keep, other=0) != 0)
            key = tl.load(
                k_ptr + token[None, :] * k_l + depth[:, None], mask=keep[None, :], other=0.0
            )
            logit = tl.dot(coarse, key, input_precision="ieee")
            if SPLIT:
                logit = tl.dot(fine, key, logit)
            logit = tl.where(keep[None, :], logit, float("-inf"))
            top = tl.max(logit, 1)
            # a stand-in of a block without a valid key so far is nobody's peak
            instead = tl.where(tl.max(keep.to(tl.int32), 0) > 0, weight, float("-inf"))
            new = tl.maximum(peak, tl.maximum(top, instead))
            base = tl.where(new == float("-inf"), 0.0, new)
            off = tl.exp2(logit - base[:, None]) - tl.exp2(instead - base)[:, None]
            off = tl.where(keep[None, :], tl.abs(off), 0.0)
            total = total * tl.exp2(peak - base) + tl.sum(off, 1)
            peak = new
        where = j * rows + row
        tl.store(sum_ptr + where, total, mask=there)
        tl.store(peak_ptr + where, peak, mask=there)


def error_probe(
    queries: Tensor,
    k: Tensor,
    log_weight: Tensor,
    perm: Tensor,
    offsets: Tensor,
    num_blocks: int,
    scale: float,
    key_valid: Tensor | None,
) -> Tensor:
    batch, heads, rows, depth = queries.shape
    shape = (batch, heads, num_blocks, rows)
    total = torch.empty(shape, dtype=torch.float32, device=k.device)
    peak = torch.empty_like(total)
    if total.numel() == 0:
        return total.mT
    k = k if k.stride(3) == 1 else k.contiguous()
    log_weight = log_weight if log_weight.stride(3) == 1 else log_weight.contiguous()
    block_m = 64
    tiles = triton.cdiv(rows, block_m)
    parts = min(num_blocks, max(1, triton.cdiv(_PROGRAMS, tiles * batch * heads)))
    chunk = triton.cdiv(num_blocks, parts)
    valid = perm if key_valid is None else key_valid.contiguous()
    _probe[(tiles * triton.cdiv(num_blocks, chunk), batch * heads)](
        queries.float().contiguous(),
        k,
        log_weight,
        perm.contiguous(),
        offsets.contiguous(),
        valid,
        total,
        peak,
        *k.stride()[:3],
        *log_weight.stride()[:3],
        *lead_strides(perm.contiguous()),
        *lead_strides(offsets.contiguous()),
        k.shape[2] if key_valid is not None else 0,
        scale,
        heads,
        rows,
        num_blocks,
        chunk,
        D=depth,
        BM=block_m,
        BN=64,
        HAS_VALID=key_valid is not None,
        SPLIT=k.dtype != torch.float32,
        num_warps=4,
        num_stages=2,
    )
    highest = peak.amax(2, keepdim=True)
    peak.sub_(highest.masked_fill_(highest == -torch.inf, 0.0)).exp2_()
    return total.mul_(peak).mT


def _specimen(depth: int, dtype: str, valid: bool) -> Specimen:
    constants = {"D": depth, "BM": 64, "BN": 64, "HAS_VALID": valid, "SPLIT": dtype != "fp32"}
    types = {
        "q_ptr": "*fp32",
        "k_ptr": f"*{dtype}",
        "weight_ptr": "*fp32",
        "perm_ptr": "*i64",
        "off_ptr": "*i32",
        "valid_ptr": "*i1" if valid else "*i64",
        "sum_ptr": "*fp32",
        "peak_ptr": "*fp32",
        "scale": "fp32",
    }
    return Specimen(
        f"probe {dtype} D={depth}{' valid' if valid else ''}",
        _probe,
        typed(_probe, constants, **types),
        constants,
        {"num_warps": 4, "num_stages": 2},
        aligned=("k_b", "k_h", "k_l"),
    )


SPECIMENS = [
    _specimen(depth, dtype, valid)
    for depth, dtype, valid in ((64, "fp16", False), (128, "bf16", False), (128, "bf16", True))
]
