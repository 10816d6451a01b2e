"""Block importance in Triton: one pass over the sampled logits, which are never stored.

A softmax needs its normaliser before the shares of several queries can be added up. Either the
logits are made twice, or a number is kept for each query and key block in between. Making them
costs ``2 D`` operations and an exponential a pair; keeping a block's sum, relative to the largest
of 128 keys, costs 5 bytes of traffic for every 16 pairs, which is the cheaper on every GPU so far.
A few heads at a time, so that what is kept stays small.

Key blocks are cut into cells of 16 sampled keys, the last of each padded: a block of 64 keys is one
cell, and ragged blocks are as many as they need. Eight cells are a turn, whose keys are laid out
so that a product leaves all of a cell to one thread: column ``64 a + 8 b + 2 c + d`` is key
``2 b + d`` of cell ``2 c + a``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.backends import HEAD_SIZES, is_hopper
from dit_accel.kernels.block_importance.samples import (
    CELL,
    NUMBERS,
    PER,
    TURN,
    Probe,
    cells_of,
    one_each,
    room_for,
    signature_of,
)
from dit_accel.kernels.gather import gather_rows, specimen
from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import remembered
from dit_accel.kernels.specimen import Specimen, typed

LOG2E = tl.constexpr(1.4426950408889634)
KEPT_BYTES = 2**30
"""What the sums by query and cell may take."""
BY_CELL = {"BR": 8, "BC": 256, "num_warps": 4}
BY_BLOCK = {"BR": 8, "BC": 128, "num_warps": 4}


@triton.jit(do_not_specialize=NUMBERS)
def sums_kernel(
    q,
    keys,
    q_token,
    q_bound,
    cell,
    key_token,
    plain,
    sums,
    bases,
    lse,
    q_b,
    q_h,
    q_l,
    token_b,
    token_h,
    bound_b,
    bound_h,
    cell_b,
    cell_h,
    turn_b,
    turn_h,
    scale,
    turns,
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
    count = tl.load(q_bound + b * bound_b + h * bound_h + rows)
    sample = tl.program_id(0) * BM + tl.arange(0, BM)
    if tl.program_id(0) * BM >= count:
        return
    there = sample < count
    depth = tl.arange(0, D)
    token = tl.load(q_token + b * token_b + h * token_h + sample, mask=there, other=0)
    query = tl.load(
        q + b * q_b + h * q_h + token[:, None] * q_l + depth[None, :],
        mask=there[:, None],
        other=0.0,
    )
    keys += pair * turns * (BN * D)
    key_token += (b * turn_b + h * turn_h) * BN
    cells = tl.load(cell + b * cell_b + h * cell_h + columns)
    line = (pair * samples + sample) * turns
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    column = tl.arange(0, BN)
    within = tl.arange(0, BN // W)
    for turn in range(0, (cells * W + BN - 1) // BN):
        at = turn * BN + column
        key = tl.load(keys + at[None, :] * D + depth[:, None])
        full = tl.load(key_token + at) >= 0
        logit = tl.dot(query, key, input_precision="ieee") * (scale * LOG2E)
        logit = tl.where(full[None, :], logit, float("-inf"))
        base = tl.max(logit, 1)
        # a turn of empty blocks has no key
        safe = tl.where(base == float("-inf"), 0.0, base)
        weight = tl.reshape(tl.exp2(logit - safe[:, None]), [BM, 2, 8, 4, 2])
        halves = tl.sum(tl.sum(weight, 4), 2)
        by_cell = tl.reshape(tl.permute(halves, [0, 2, 1]), [BM, BN // W])
        where = (line + turn)[:, None] * (BN // W) + within[None, :]
        tl.store(sums + where, by_cell.to(sums.dtype.element_ty), mask=there[:, None])
        tl.store(bases + (pair * turns + turn) * samples + sample, base, mask=there)
        new = tl.maximum(peak, base)
        level = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(peak - level) + tl.sum(by_cell, 1) * tl.exp2(base - level)
        peak = new
    tl.store(lse + pair * samples + sample, tl.log2(total) + peak, mask=there)


@triton.jit(do_not_specialize=NUMBERS)
def shares_kernel(
    sums,
    bases,
    lse,
    q_bound,
    cell,
    out,
    bound_b,
    bound_h,
    cell_b,
    cell_h,
    turns,
    samples,
    rows,
    columns,
    heads,
    first_pair,
    EACH: tl.constexpr,
    PER: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Shares of some blocks of keys, added up over the samples of a block of queries."""
    pair = tl.program_id(2).to(tl.int64)
    b, h = (first_pair + pair) // heads, (first_pair + pair) % heads
    i = tl.program_id(1)
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = column < columns
    q_bound += b * bound_b + h * bound_h
    start = tl.load(q_bound + i)
    stop = tl.load(q_bound + i + 1)
    # a multiple of 8, so that 8 sums are read at once
    width = turns * PER
    sums += pair * samples * width
    bases += pair * samples * turns
    lse += pair * samples
    if EACH:
        turn = tl.program_id(0) * (BC // PER) + tl.arange(0, BC // PER)
        all_shares = tl.zeros([BR, BC // PER, PER], tl.float32)
        for first in range(start, stop, BR):
            sample = first + tl.arange(0, BR)
            there = sample < stop
            norm = tl.load(lse + sample, mask=there, other=0.0)
            norm = tl.where(norm == float("-inf"), 0.0, norm)
            known = there[:, None] & (turn < turns)[None, :]
            at = turn[None, :].to(tl.int64) * samples + sample[:, None]
            base = tl.load(bases + at, mask=known, other=float("-inf"))
            known = there[:, None] & (column < width)[None, :]
            at = sample[:, None].to(tl.int64) * width + column[None, :]
            part = tl.load(sums + at, mask=known, other=0.0)
            part = tl.reshape(part, [BR, BC // PER, PER]).to(tl.float32)
            all_shares += part * tl.exp2(base - norm[:, None])[:, :, None]
        total = tl.reshape(tl.sum(all_shares, 0), [BC])
    else:
        cell += b * cell_b + h * cell_h
        first_cell = tl.load(cell + column, mask=inside, other=0)
        cells = tl.load(cell + column + 1, mask=inside, other=0) - first_cell
        most = tl.max(cells, 0)
        shares = tl.zeros([BR, BC], tl.float32)
        for first in range(start, stop, BR):
            sample = first + tl.arange(0, BR)
            there = sample < stop
            norm = tl.load(lse + sample, mask=there, other=0.0)
            norm = tl.where(norm == float("-inf"), 0.0, norm)
            line = sample.to(tl.int64)[:, None]
            for step in range(0, most):
                known = there[:, None] & (inside & (step < cells))[None, :]
                at = (first_cell + step)[None, :]
                part = tl.load(sums + line * width + at, mask=known, other=0.0)
                turn_at = (at // PER).to(tl.int64) * samples
                base = tl.load(bases + turn_at + line, mask=known, other=float("-inf"))
                shares += part.to(tl.float32) * tl.exp2(base - norm[:, None])
        total = tl.sum(shares, 0)
    tl.store(out + (((b * heads + h) * rows + i) * columns + column), total, mask=inside)


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
        k_tokens, k_bounds, ("cells", k_longest), lambda: cells_of(k_tokens, k_bounds, k_longest)
    )
    q_tokens, q_bounds = q_tokens.contiguous(), q_bounds.contiguous()
    slots = cells.tokens.shape[-1]
    each = one_each(k_longest)
    pairs = batch * heads
    size = samples * (slots // CELL) * (2 if q.dtype.itemsize == 2 else 4)
    parts = -(-pairs // min(pairs, max(1, KEPT_BYTES // size)))
    kept = room_for(-(-pairs // parts), samples, slots, q)
    run = _sums
    if q.dtype.itemsize == 2 and depth in HEAD_SIZES and scale > 0 and is_hopper(q.device):
        from dit_accel.kernels.block_importance import hopper

        run = hopper.sums
    tile = BY_CELL if each else BY_BLOCK
    for part in range(parts):
        # as even as can be
        first, last = pairs * part // parts, pairs * (part + 1) // parts
        gather_rows(k, cells.tokens, kept.keys, first, last - first)
        run(Probe(q, q_tokens, q_bounds, cells, kept, float(scale), first, last - first))
        launch(
            shares_kernel,
            (-(-columns // tile["BC"]), rows, last - first),
            (kept.sums, kept.bases, kept.lse, q_bounds, cells.first, out),
            (
                *(*lead_strides(q_bounds), *lead_strides(cells.first)),
                *(slots // TURN, samples, rows, columns, heads, first),
            ),
            EACH=each,
            PER=PER,
            **tile,
        )
    return out


def _sums(probe: Probe) -> None:
    """Fill what is kept of some heads of a batch, from the keys in it."""
    half = probe.q.dtype.itemsize == 2
    block = 128 if half else 64
    launch(
        sums_kernel,
        (-(-probe.tokens.shape[-1] // block), probe.pairs),
        probe.pointers(probe.kept.keys),
        probe.sizes(),
        D=probe.q.shape[-1],
        BM=block,
        BN=TURN,
        W=CELL,
        num_warps=8 if half else 4,
        num_stages=3 if half else 2,
    )


def _specimens(depth: int, dtype: str) -> list[Specimen]:
    constants = {"D": depth, "BM": 128, "BN": TURN, "W": CELL}
    found = [
        specimen(depth, dtype),
        Specimen(
            f"sums {dtype} D={depth}",
            sums_kernel,
            signature_of(sums_kernel, dtype, f"*{dtype}"),
            constants,
            {"num_warps": 8, "num_stages": 3},
            aligned=("q_b", "q_h", "q_l"),
        ),
    ]
    for each, tile in ((True, BY_CELL), (False, BY_BLOCK)):
        constants = {"EACH": each, "PER": PER, "BR": tile["BR"], "BC": tile["BC"]}
        types = {"sums": "*fp16", **dict.fromkeys(("bases", "lse", "out"), "*fp32")}
        types |= {"q_bound": "*i32", "cell": "*i32"}
        found.append(
            Specimen(
                f"shares {'by cell' if each else 'by block'}",
                shares_kernel,
                typed(shares_kernel, constants, **types),
                constants,
                {"num_warps": tile["num_warps"]},
            )
        )
    return found


SPECIMENS = (
    [*_specimens(64, "fp16"), *_specimens(128, "bf16")]
    if isinstance(sums_kernel, triton.JITFunction)
    else []
)
