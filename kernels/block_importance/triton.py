"""Block importance in Triton: one pass over the sampled logits, which are never stored.

A softmax needs its normaliser before the shares of several queries can be added up. Either the
logits are made twice, or a number is kept for each query and key block in between. Making them
costs ``2 D`` operations and an exponential a pair; keeping the logarithm of a block's sum costs 8
bytes of traffic for every 16 pairs, which is the cheaper on every GPU so far. A few heads at a
time, so that what is kept stays small.

Key blocks are cut into cells of 16 sampled keys, the last of each padded: a block of 64 keys is one
cell, and ragged blocks are as many as they need.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.gather import gather_rows, specimen
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed

LOG2E = tl.constexpr(1.4426950408889634)
CELL = 16
KEPT_BYTES = 2**30
"""What the sums by query and cell may take."""


@triton.jit(do_not_specialize=["heads", "first_pair", "slots", "samples", "rows", "columns"])
def _sums(
    q_ptr,
    key_ptr,
    q_token_ptr,
    q_bound_ptr,
    key_token_ptr,
    cell_ptr,
    sum_ptr,
    lse_ptr,
    q_b,
    q_h,
    q_l,
    q_token_b,
    q_token_h,
    q_bound_b,
    q_bound_h,
    key_token_b,
    key_token_h,
    cell_b,
    cell_h,
    scale,
    slots,
    samples,
    rows,
    columns,
    heads,
    first_pair,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    W: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    b, h = (first_pair + pair) // heads, (first_pair + pair) % heads
    count = tl.load(q_bound_ptr + b * q_bound_b + h * q_bound_h + rows)
    sample = tl.program_id(0) * BM + tl.arange(0, BM)
    if tl.program_id(0) * BM >= count:
        return
    there = sample < count
    depth = tl.arange(0, D)
    token = tl.load(q_token_ptr + b * q_token_b + h * q_token_h + sample, mask=there, other=0)
    query = tl.load(
        q_ptr + b * q_b + h * q_h + token[:, None] * q_l + depth[None, :],
        mask=there[:, None],
        other=0.0,
    )
    key_ptr += pair * slots * D
    key_token_ptr += b * key_token_b + h * key_token_h
    cells = tl.load(cell_ptr + b * cell_b + h * cell_h + columns).to(tl.int32)
    width = slots // W
    sum_ptr += pair * samples * width
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    column = tl.arange(0, BN)
    for first in range(0, cells * W, BN):
        inside = first + column < cells * W
        key = tl.load(
            key_ptr + (first + column)[None, :] * D + depth[:, None],
            mask=inside[None, :],
            other=0.0,
        )
        full = tl.load(key_token_ptr + first + column, mask=inside, other=-1) >= 0
        logit = tl.dot(query, key, input_precision="ieee") * (scale * LOG2E)
        logit = tl.where(full[None, :], logit, float("-inf"))
        top = tl.max(logit, 1)
        base = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(logit - base[:, None])
        by_cell = tl.sum(tl.reshape(weight, [BM, BN // W, W]), 2)
        cell = first // W + tl.arange(0, BN // W)
        tl.store(
            sum_ptr + sample.to(tl.int64)[:, None] * width + cell[None, :],
            tl.log2(by_cell) + base[:, None],
            mask=there[:, None] & (cell < cells)[None, :],
        )
        new = tl.maximum(peak, base)
        total = total * tl.exp2(peak - new) + tl.sum(by_cell, 1) * tl.exp2(base - new)
        peak = new
    tl.store(lse_ptr + pair * samples + sample, tl.log2(total) + peak, mask=there)


@triton.jit(do_not_specialize=["heads", "first_pair", "samples", "width", "rows", "columns"])
def _by_block(
    sum_ptr,
    lse_ptr,
    q_bound_ptr,
    cell_ptr,
    out_ptr,
    q_bound_b,
    q_bound_h,
    cell_b,
    cell_h,
    samples,
    width,
    rows,
    columns,
    heads,
    first_pair,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    pair = tl.program_id(2).to(tl.int64)
    b, h = (first_pair + pair) // heads, (first_pair + pair) % heads
    i = tl.program_id(1)
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = column < columns
    cell_ptr += b * cell_b + h * cell_h
    cell = tl.load(cell_ptr + column, mask=inside, other=0)
    cells = tl.load(cell_ptr + column + 1, mask=inside, other=0) - cell
    q_bound_ptr += b * q_bound_b + h * q_bound_h
    start = tl.load(q_bound_ptr + i)
    stop = tl.load(q_bound_ptr + i + 1)
    sum_ptr += pair * samples * width
    lse_ptr += pair * samples
    total = tl.zeros([BR, BC], tl.float32)
    most = tl.max(cells, 0)
    for first in range(start, stop, BR):
        sample = first + tl.arange(0, BR)
        there = sample < stop
        lse = tl.load(lse_ptr + sample, mask=there, other=0.0)
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        for step in range(0, most):
            part = tl.load(
                sum_ptr + sample.to(tl.int64)[:, None] * width + (cell + step)[None, :],
                mask=there[:, None] & (inside & (step < cells))[None, :],
                other=float("-inf"),
            )
            total += tl.exp2(part - lse[:, None])
    tl.store(
        out_ptr + (((b * heads + h) * rows + i) * columns + column), tl.sum(total, 0), mask=inside
    )


def _cells(bounds: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of samples padded to whole cells.

    Returns:
        int32 ``[B|1, H|1, S]``, a token for each slot or -1, and int32 ``[B|1, H|1, N + 1]``, the
        cells of each block.
    """
    bounds = bounds.long()
    lead = tuple(max(a, b) for a, b in zip(bounds.shape[:2], tokens.shape[:2], strict=True))
    bounds, tokens = bounds.expand(*lead, -1), tokens.expand(*lead, -1)
    count = bounds.diff(dim=-1)
    ends = (-(-count // CELL)).cumsum(-1)
    cells = torch.nn.functional.pad(ends, (1, 0))
    slots = (tokens.shape[-1] // CELL + count.shape[-1]) * CELL
    slot = torch.arange(slots, device=tokens.device).expand(*lead, -1).contiguous()
    block = torch.searchsorted(ends.contiguous(), slot // CELL, right=True)
    block.clamp_(max=count.shape[-1] - 1)
    inside = slot - cells.gather(-1, block) * CELL
    keep = inside < count.gather(-1, block)
    where = (bounds.gather(-1, block) + inside).clamp_(max=tokens.shape[-1] - 1)
    token = tokens.gather(-1, where).masked_fill_(~keep, -1)
    return token.to(torch.int32), cells.to(torch.int32)


def block_importance(
    q: Tensor,
    k: Tensor,
    q_tokens: Tensor,
    q_bounds: Tensor,
    k_tokens: Tensor,
    k_bounds: Tensor,
    scale: float,
) -> Tensor:
    batch, heads, _, depth = q.shape
    rows, columns = q_bounds.shape[-1] - 1, k_bounds.shape[-1] - 1
    out = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    samples = q_tokens.shape[-1]
    if out.numel() == 0 or samples == 0 or k_tokens.shape[-1] == 0:
        return out.zero_()
    q = q if q.stride(3) == 1 else q.contiguous()
    k = k if k.stride(3) == 1 else k.contiguous()
    tokens, cells = _cells(k_bounds, k_tokens)
    q_tokens, q_bounds = q_tokens.contiguous(), q_bounds.to(torch.int32).contiguous()
    slots = tokens.shape[-1]
    width = slots // CELL
    pairs = batch * heads
    at_once = min(pairs, max(1, KEPT_BYTES // (samples * width * 4)))
    keys = torch.empty(at_once, slots, depth, dtype=k.dtype, device=k.device)
    sums = torch.empty(at_once, samples, width, dtype=torch.float32, device=k.device)
    lse = torch.empty(at_once, samples, dtype=torch.float32, device=k.device)
    half = q.dtype != torch.float32
    block_m, block_n = (128, 128) if half else (64, 64)
    for first in range(0, pairs, at_once):
        some = min(at_once, pairs - first)
        gather_rows(k, tokens, keys, first, some)
        _sums[(triton.cdiv(samples, block_m), some)](
            q,
            keys,
            q_tokens,
            q_bounds,
            tokens,
            cells,
            sums,
            lse,
            *q.stride()[:3],
            *lead_strides(q_tokens),
            *lead_strides(q_bounds),
            *lead_strides(tokens),
            *lead_strides(cells),
            scale,
            slots,
            samples,
            rows,
            columns,
            heads,
            first,
            D=depth,
            BM=block_m,
            BN=block_n,
            W=CELL,
            num_warps=8 if half else 4,
            num_stages=3,
        )
        _by_block[(triton.cdiv(columns, 128), rows, some)](
            sums,
            lse,
            q_bounds,
            cells,
            out,
            *lead_strides(q_bounds),
            *lead_strides(cells),
            samples,
            width,
            rows,
            columns,
            heads,
            first,
            BR=8,
            BC=128,
            num_warps=4,
        )
    return out


def _specimens(depth: int, dtype: str) -> list[Specimen]:
    types = {
        "q_ptr": f"*{dtype}",
        "key_ptr": f"*{dtype}",
        "key_token_ptr": "*i32",
        "q_token_ptr": "*i64",
        "q_bound_ptr": "*i32",
        "cell_ptr": "*i32",
        "sum_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "out_ptr": "*fp32",
        "scale": "fp32",
    }
    plain: list[tuple[Any, dict[str, int], dict[str, int]]] = [
        (
            _sums,
            {"D": depth, "BM": 128, "BN": 128, "W": CELL},
            {"num_warps": 8, "num_stages": 3},
        ),
        (_by_block, {"BR": 8, "BC": 128}, {"num_warps": 4}),
    ]
    return [
        specimen(depth, dtype),
        *(
            Specimen(
                f"{kernel.__name__} {dtype} D={depth}",
                kernel,
                typed(kernel, constants, **types),
                constants,
                options,
                aligned=("q_b", "q_h", "q_l"),
            )
            for kernel, constants, options in plain
        ),
    ]


SPECIMENS = [*_specimens(64, "fp16"), *_specimens(128, "bf16")]
