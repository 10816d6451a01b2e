"""Block importance in Triton: one pass over the sampled logits, which are never stored.

A softmax needs its normaliser before the shares of several queries can be added up. Either the
logits are made twice, or a number is kept for each query and key block in between. Making them
costs ``2 D`` operations and an exponential a pair; keeping a block's sum, relative to the largest
of 128 keys, costs 9 bytes of traffic for every 16 pairs, which is the cheaper on every GPU so far.
A few heads at a time, so that what is kept stays small.

Key blocks are cut into cells of 16 sampled keys, the last of each padded: a block of 64 keys is one
cell, and ragged blocks are as many as they need. Eight cells are a turn, whose keys are laid out
so that a product leaves all of a cell to one thread: column ``64 a + 8 b + 2 c + d`` is key
``2 b + d`` of cell ``2 c + a``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.backends import HEAD_SIZES, is_hopper
from dit_accel.kernels.gather import gather_rows, specimen
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import remembered
from dit_accel.kernels.specimen import Specimen, typed

LOG2E = tl.constexpr(1.4426950408889634)
CELL = 16
"""Sampled keys of a cell."""
TURN = 128
"""Slots for sampled keys that a kernel takes at once, of 8 cells."""
KEPT_BYTES = 2**30
"""What the sums by query and cell may take."""


BY_BLOCK = {"BR": 8, "BC": 128, "num_warps": 4}


class Kept(NamedTuple):
    """What is kept of some heads: fp32 but for the keys.

    ``keys`` ``[P, S, D]`` in slots; ``sums`` ``[P, M, S / 16]`` of weights by query and cell, in
    powers of two relative to ``bases`` ``[P, S / 128, M]`` by turn and query; ``lse`` ``[P, M]``.
    """

    keys: Tensor
    sums: Tensor
    bases: Tensor
    lse: Tensor


@triton.jit(do_not_specialize=["heads", "first_pair", "slots", "samples", "rows", "columns"])
def _sums(
    q_ptr,
    key_ptr,
    q_token_ptr,
    q_bound_ptr,
    key_token_ptr,
    cell_ptr,
    sum_ptr,
    base_ptr,
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
    cells = tl.load(cell_ptr + b * cell_b + h * cell_h + columns)
    turns = slots // BN
    line = (pair * samples + sample) * turns
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    column = tl.arange(0, BN)
    cell = tl.arange(0, BN // W)
    for turn in range(0, (cells * W + BN - 1) // BN):
        at = turn * BN + column
        key = tl.load(key_ptr + at[None, :] * D + depth[:, None])
        full = tl.load(key_token_ptr + at) >= 0
        logit = tl.dot(query, key, input_precision="ieee") * (scale * LOG2E)
        logit = tl.where(full[None, :], logit, float("-inf"))
        # a turn has at least one key
        base = tl.max(logit, 1)
        weight = tl.reshape(tl.exp2(logit - base[:, None]), [BM, 2, 8, 4, 2])
        halves = tl.sum(tl.sum(weight, 4), 2)
        by_cell = tl.reshape(tl.permute(halves, [0, 2, 1]), [BM, BN // W])
        where = (line + turn)[:, None] * (BN // W) + cell[None, :]
        tl.store(sum_ptr + where, by_cell, mask=there[:, None])
        tl.store(base_ptr + (pair * turns + turn) * samples + sample, base, mask=there)
        new = tl.maximum(peak, base)
        total = total * tl.exp2(peak - new) + tl.sum(by_cell, 1) * tl.exp2(base - new)
        peak = new
    tl.store(lse_ptr + pair * samples + sample, tl.log2(total) + peak, mask=there)


@triton.jit(do_not_specialize=["heads", "first_pair", "samples", "width", "rows", "columns"])
def _by_block(
    sum_ptr,
    base_ptr,
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
    PER: tl.constexpr,
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
    base_ptr += pair * samples * (width // PER)
    lse_ptr += pair * samples
    total = tl.zeros([BR, BC], tl.float32)
    most = tl.max(cells, 0)
    for first in range(start, stop, BR):
        sample = first + tl.arange(0, BR)
        there = sample < stop
        lse = tl.load(lse_ptr + sample, mask=there, other=0.0)
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        for step in range(0, most):
            known = there[:, None] & (inside & (step < cells))[None, :]
            line = sample.to(tl.int64)[:, None]
            at = (cell + step)[None, :]
            part = tl.load(sum_ptr + line * width + at, mask=known, other=0.0)
            turn = (at // PER).to(tl.int64)
            base = tl.load(base_ptr + turn * samples + line, mask=known, other=0.0)
            total += part * tl.exp2(base - lse[:, None])
    tl.store(
        out_ptr + (((b * heads + h) * rows + i) * columns + column), tl.sum(total, 0), mask=inside
    )


class Cells(NamedTuple):
    """Blocks of samples padded to whole cells, and those to whole turns.

    ``tokens`` int32 ``[B|1, H|1, S]``, a token for each slot or -1; ``first`` int32
    ``[B|1, H|1, N + 1]``, the cells of each block; ``plain`` int8 ``[B|1, H|1, S / 128]``, turns
    without a -1.
    """

    tokens: Tensor
    first: Tensor
    plain: Tensor


def _cells(bounds: Tensor, tokens: Tensor, longest: int | None) -> Cells:
    bounds = bounds.long()
    lead = tuple(max(a, b) for a, b in zip(bounds.shape[:2], tokens.shape[:2], strict=True))
    bounds, tokens = bounds.expand(*lead, -1), tokens.expand(*lead, -1)
    count = bounds.diff(dim=-1)
    ends = (-(-count // CELL)).cumsum(-1)
    cells = torch.nn.functional.pad(ends, (1, 0))
    most = tokens.shape[-1] // CELL + count.shape[-1]
    if longest is not None:
        most = min(most, count.shape[-1] * -(-longest // CELL))
    slots = -(-most * CELL // TURN) * TURN
    slot = torch.arange(slots, device=tokens.device)
    turn, column = slot // TURN, slot % TURN
    of = turn * (TURN // CELL) + column % 8 // 2 * 2 + column // 64
    within = column % 64 // 8 * 2 + column % 2
    of, within = of.expand(*lead, -1).contiguous(), within.expand(*lead, -1)
    block = torch.searchsorted(ends.contiguous(), of, right=True)
    block.clamp_(max=count.shape[-1] - 1)
    inside = (of - cells.gather(-1, block)) * CELL + within
    keep = (inside < count.gather(-1, block)) & (of < ends[..., -1:])
    where = (bounds.gather(-1, block) + inside).clamp_(max=tokens.shape[-1] - 1)
    token = tokens.gather(-1, where).masked_fill_(~keep, -1).to(torch.int32)
    plain = (token.view(*lead, -1, TURN) >= 0).all(-1)
    return Cells(token, cells.to(torch.int32), plain.to(torch.int8))


def block_importance(
    q: Tensor,
    k: Tensor,
    q_tokens: Tensor,
    q_bounds: Tensor,
    k_tokens: Tensor,
    k_bounds: Tensor,
    scale: float,
    k_longest: int | None = None,
) -> Tensor:
    batch, heads, _, depth = q.shape
    rows, columns = q_bounds.shape[-1] - 1, k_bounds.shape[-1] - 1
    out = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    samples = q_tokens.shape[-1]
    if out.numel() == 0 or samples == 0 or k_tokens.shape[-1] == 0:
        return out.zero_()
    q = q if q.stride(3) == 1 else q.contiguous()
    k = k if k.stride(3) == 1 else k.contiguous()
    cells = remembered(
        k_tokens, k_bounds, ("cells", k_longest), lambda: _cells(k_bounds, k_tokens, k_longest)
    )
    q_tokens, q_bounds = q_tokens.contiguous(), q_bounds.contiguous()
    slots = cells.tokens.shape[-1]
    width = slots // CELL
    pairs = batch * heads
    at_once = min(pairs, max(1, KEPT_BYTES // (samples * width * 4)))
    kept = Kept(
        torch.empty(at_once, slots, depth, dtype=k.dtype, device=k.device),
        torch.empty(at_once, samples, width, dtype=torch.float32, device=k.device),
        torch.empty(at_once, slots // TURN, samples, dtype=torch.float32, device=k.device),
        torch.empty(at_once, samples, dtype=torch.float32, device=k.device),
    )
    run = _sums_of
    if q.dtype.itemsize == 2 and depth in HEAD_SIZES and scale > 0 and is_hopper(q.device):
        from dit_accel.kernels.block_importance import hopper

        run = hopper.sums
    for first in range(0, pairs, at_once):
        some = min(at_once, pairs - first)
        gather_rows(k, cells.tokens, kept.keys, first, some)
        run(q, q_tokens, q_bounds, cells, kept, first, some, scale)
        _by_block[(triton.cdiv(columns, BY_BLOCK["BC"]), rows, some)](
            kept.sums,
            kept.bases,
            kept.lse,
            q_bounds,
            cells.first,
            out,
            *lead_strides(q_bounds),
            *lead_strides(cells.first),
            samples,
            width,
            rows,
            columns,
            heads,
            first,
            PER=TURN // CELL,
            **BY_BLOCK,
        )
    return out


def _sums_of(
    q: Tensor,
    q_tokens: Tensor,
    q_bounds: Tensor,
    cells: Cells,
    kept: Kept,
    first: int,
    pairs: int,
    scale: float,
) -> None:
    """Fill what is kept of some heads of a batch, from the keys in it."""
    half = q.dtype != torch.float32
    block = 128 if half else 64
    samples, depth = q_tokens.shape[-1], q.shape[-1]
    _sums[(triton.cdiv(samples, block), pairs)](
        q,
        kept.keys,
        q_tokens,
        q_bounds,
        cells.tokens,
        cells.first,
        kept.sums,
        kept.bases,
        kept.lse,
        *q.stride()[:3],
        *lead_strides(q_tokens),
        *lead_strides(q_bounds),
        *lead_strides(cells.tokens),
        *lead_strides(cells.first),
        scale,
        cells.tokens.shape[-1],
        samples,
        q_bounds.shape[-1] - 1,
        cells.first.shape[-1] - 1,
        q.shape[1],
        first,
        D=depth,
        BM=block,
        BN=TURN,
        W=CELL,
        num_warps=8 if half else 4,
        num_stages=3 if half else 2,
    )


def _specimens(depth: int, dtype: str) -> list[Specimen]:
    types = {
        "q_ptr": f"*{dtype}",
        "key_ptr": f"*{dtype}",
        "key_token_ptr": "*i32",
        "q_token_ptr": "*i64",
        "q_bound_ptr": "*i32",
        "cell_ptr": "*i32",
        "sum_ptr": "*fp32",
        "base_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "out_ptr": "*fp32",
        "scale": "fp32",
    }
    plain: list[tuple[Any, dict[str, int], dict[str, int]]] = [
        (
            _sums,
            {"D": depth, "BM": 128, "BN": TURN, "W": CELL},
            {"num_warps": 8, "num_stages": 3},
        ),
        (_by_block, {"PER": TURN // CELL, "BR": 8, "BC": 128}, {"num_warps": 4}),
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
