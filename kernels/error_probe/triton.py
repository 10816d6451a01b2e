"""The error probe in Triton: one pass over the keys, by chunks of blocks.

Every pair of a row and a block has a peak and a sum of its own, rescaled as its keys go by, so a
program needs no one else's; the peaks of a row meet when all is done. Blocks are cut into tiles,
and a program takes one after the other, of whatever block, so that the next keys are on their way.
The queries are few and means, often of thousands: for keys of 16 bits they are split into two
numbers of 16 bits, and the logits are as good as in fp32 at twice the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.cutting import cut_blocks
from dit_accel.kernels.error_probe.plan import choose
from dit_accel.kernels.error_probe.plan import specimen as specimen_of_choice
from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import BLOCK_BIT, LENGTH_BITS, START_BIT, Compact, compact
from dit_accel.kernels.specimen import Specimen, typed
from dit_accel.kernels.tuning import SPACES, setting

LOG2E = tl.constexpr(1.4426950408889634)
_BITS = tl.constexpr(START_BIT)
_BLOCK = tl.constexpr(BLOCK_BIT)
_MASK = tl.constexpr((1 << LENGTH_BITS) - 1)
_PROGRAMS = 2048
"""As many programs as keep a large GPU busy, if the blocks can be cut into so many chunks."""


@triton.jit(do_not_specialize=["heads", "rows", "blocks", "chunk"])
def _probe(
    q_ptr,
    k_ptr,
    weight_ptr,
    perm_ptr,
    block_ptr,
    span_ptr,
    first_ptr,
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
    tile_b,
    tile_h,
    first_b,
    first_h,
    scale,
    heads,
    rows,
    blocks,
    chunk,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
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
    weight_ptr += b * weight_b + h * weight_h + row.to(tl.int64) * weight_q
    perm_ptr += b * perm_b + h * perm_h
    block_ptr += b * tile_b + h * tile_h
    span_ptr += b * tile_b + h * tile_h
    first_ptr += b * first_b + h * first_h
    sum_ptr += pair * blocks * rows + row
    peak_ptr += pair * blocks * rows + row

    begin = tl.load(first_ptr + part * chunk)
    end = tl.load(first_ptr + tl.minimum(part * chunk + chunk, blocks))
    current = -1
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):
        where = tl.load(span_ptr + i)
        j = tl.load(block_ptr + i) >> _BLOCK
        keep = tl.arange(0, BN) < (where & _MASK)
        token = tl.load(perm_ptr + (where >> _BITS) + tl.arange(0, BN), mask=keep, other=0)
        key = tl.load(
            k_ptr + token.to(tl.int64)[None, :] * k_l + depth[:, None],
            mask=keep[None, :],
            other=0.0,
        )
        instead = tl.load(weight_ptr + j, mask=there, other=0.0).to(tl.float32) * LOG2E
        logit = tl.dot(coarse, key, input_precision="ieee")
        if SPLIT:
            logit = tl.dot(fine, key, logit)
        logit = tl.where(keep[None, :], logit, float("-inf"))
        peak = tl.where(j == current, peak, float("-inf"))
        total = tl.where(j == current, total, 0.0)
        current = j
        new = tl.maximum(peak, tl.maximum(tl.max(logit, 1), instead))
        base = tl.where(new == float("-inf"), 0.0, new)
        off = tl.exp2(logit - base[:, None]) - tl.exp2(instead - base)[:, None]
        off = tl.where(keep[None, :], tl.abs(off), 0.0)
        total = total * tl.exp2(peak - base) + tl.sum(off, 1)
        peak = new
        # the last tile of a block has the last word
        tl.store(sum_ptr + j.to(tl.int64) * rows, total, mask=there)
        tl.store(peak_ptr + j.to(tl.int64) * rows, peak, mask=there)


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
    batch, heads, rows, _ = queries.shape
    shape = (batch, heads, num_blocks, rows)
    total = torch.zeros(shape, dtype=torch.float32, device=k.device)
    peak = torch.full_like(total, -torch.inf)
    if total.numel():
        order = compact(perm, offsets, key_valid)
        _launch(queries, k, log_weight, order, scale, total, peak)
        highest = peak.amax(2, keepdim=True)
        peak.sub_(highest.masked_fill_(highest == -torch.inf, 0.0)).exp2_()
        total.mul_(peak)
    return total.mT


def error_plan(
    queries: Tensor,
    k: Tensor,
    log_weight: Tensor,
    perm: Tensor,
    offsets: Tensor,
    num_blocks: int,
    scale: float,
    key_valid: Tensor | None,
    density: float,
    all_rows: int,
) -> Tensor:
    batch, heads, rows, _ = queries.shape
    shape = (batch, heads, num_blocks, rows)
    total, peak = (torch.empty(shape, dtype=torch.float32, device=k.device) for _ in range(2))
    order = compact(perm, offsets, key_valid)
    if total.numel():
        _launch(queries, k, log_weight, order, scale, total, peak)
    return choose(total, peak, order.offsets, density, all_rows, offsets.shape[-1] - 1)


def _launch(
    queries: Tensor,
    k: Tensor,
    log_weight: Tensor,
    order: Compact,
    scale: float,
    total: Tensor,
    peak: Tensor,
) -> None:
    batch, heads, num_blocks, rows = total.shape
    k = k if k.stride(3) == 1 else k.contiguous()
    log_weight = log_weight if log_weight.stride(3) == 1 else log_weight.contiguous()
    chosen = setting("error_probe", k, k.shape[2])
    tiles, first = cut_blocks(order.offsets, k.shape[2], chosen["BN"])
    across = triton.cdiv(rows, chosen["BM"])
    parts = min(num_blocks, max(1, triton.cdiv(_PROGRAMS, across * batch * heads)))
    chunk = triton.cdiv(num_blocks, parts)
    launch(
        _probe,
        (across * triton.cdiv(num_blocks, chunk), batch * heads),
        (queries.float().contiguous(), k, log_weight, order.perm, *tiles, first, total, peak),
        (
            *k.stride()[:3],
            *log_weight.stride()[:3],
            *lead_strides(order.perm),
            *lead_strides(tiles.span),
            *lead_strides(first),
            *(float(scale), heads, rows, num_blocks, chunk),
        ),
        D=k.shape[3],
        SPLIT=k.dtype != torch.float32,
        **chosen.values,
    )


def _specimen(depth: int, dtype: str) -> Specimen:
    chosen = SPACES["error_probe"].half
    constants = {**chosen.constants, "D": depth, "SPLIT": dtype != "fp32"}
    types = {
        **dict.fromkeys(("q_ptr", "weight_ptr", "sum_ptr", "peak_ptr"), "*fp32"),
        **dict.fromkeys(("perm_ptr", "block_ptr", "span_ptr", "first_ptr"), "*i32"),
        "k_ptr": f"*{dtype}",
        "scale": "fp32",
    }
    return Specimen(
        f"probe {dtype} D={depth}",
        _probe,
        typed(_probe, constants, **types),
        constants,
        chosen.options,
        aligned=("k_b", "k_h", "k_l"),
    )


SPECIMENS = [
    _specimen(64, "fp16"),
    _specimen(128, "bf16"),
    *(specimen_of_choice(columns) for columns in (512, 1024, 2048, 4096)),
]
