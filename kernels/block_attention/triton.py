"""Block attention as a kernel: one program a tile of queries, over a packed list of key tiles.

The keys and values are brought into the layout's order first, so that a tile is a run of rows. A
program takes the rest, block by block, and then its exact tiles: those of full length without a
mask, the others with one. The next tile's place is read one turn ahead.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel.kernels.backends import HEAD_SIZES, is_hopper
from dit_accel.kernels.block_attention.api import RestTerms
from dit_accel.kernels.block_attention.levels import SPECIMENS as LEVEL_SPECIMENS
from dit_accel.kernels.block_attention.levels import head_groups, level_problem
from dit_accel.kernels.block_attention.means import rows_of
from dit_accel.kernels.block_attention.problem import (
    AHEAD,
    Problem,
    packed,
    pooled_parts,
    tables_of,
    tiles_of,
)
from dit_accel.kernels.block_attention.problem import SPECIMENS as PLAN_SPECIMENS
from dit_accel.kernels.block_attention.runs import SPECIMENS as RUN_SPECIMENS
from dit_accel.kernels.block_attention.runs import packed_runs
from dit_accel.kernels.block_attention.tables import SPECIMENS as TABLE_SPECIMENS
from dit_accel.kernels.block_attention.tables import rest_tables
from dit_accel.kernels.launch import launch
from dit_accel.kernels.merge.triton import merge
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import (
    BLOCK_BIT,
    LENGTH_BITS,
    START_BIT,
    compact,
    pooled,
    remembered,
)
from dit_accel.kernels.specimen import Specimen

LOG2E = 1.4426950408889634
_POOLED_TILE = 16
"""Means in a tile: a block of 64 keys has 8 of the coarsest level, and a product wants 16."""
WEIGHTS = {"plain": 0, "second": 1, "gaussian": 2}
_BITS = tl.constexpr(START_BIT)
_COUNT = tl.constexpr(LENGTH_BITS)
_BLOCK = tl.constexpr(BLOCK_BIT)
_MASK = tl.constexpr((1 << LENGTH_BITS) - 1)


@triton.jit
def _weigh(logits, m, mass, acc):
    """One turn of the online softmax, in powers of two."""
    peak = tl.maximum(m, tl.max(logits, 1))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    p = tl.math.exp2(logits - safe[:, None])
    fade = tl.math.exp2(m - safe)
    return p, peak, mass * fade + tl.sum(p, 1), acc * fade[:, None]


_SIZES = ["heads", "length", "table", "rows", "columns", "num_tiles", "num_rows"]
_SIZES += [f"{name}_{axis}" for name in ("perm", "tile", "code", "bias") for axis in "bh"]
"""Whole numbers that no kernel is compiled for."""


@triton.jit(do_not_specialize=_SIZES)
def attend_kernel(
    q,
    keys,
    values,
    q_perm,
    q_block,
    q_span,
    listed,
    counts,
    code,
    rest_k,
    rest_v,
    rest_var,
    rest_bias,
    cov,
    out,
    lse,
    heads,
    length,
    table,
    rows,
    columns,
    num_tiles,
    num_rows,
    scale,
    q_b,
    q_h,
    q_l,
    perm_b,
    perm_h,
    tile_b,
    tile_h,
    code_b,
    code_h,
    bias_b,
    bias_h,
    out_b,
    out_h,
    out_l,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    REST: tl.constexpr,
    WEIGHT: tl.constexpr,
    FIRST_ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    # the tiles that were cut last are text, whose rows are long: they go first
    tile = num_rows - 1 - tl.program_id(0)
    at = b * tile_b + h * tile_h + tile
    where = tl.load(q_span + at)
    if where == 0:
        return
    block = tl.load(q_block + at) >> _BLOCK
    inside = tl.arange(0, BM) < (where & _MASK)
    place = (where >> _BITS) + tl.arange(0, BM)
    token = tl.load(q_perm + b * perm_b + h * perm_h + place, mask=inside, other=0)
    token = token.to(tl.int64)
    depth = tl.arange(0, D)
    query = tl.load(
        q + b * q_b + h * q_h + token[:, None] * q_l + depth[None, :],
        mask=inside[:, None],
        other=0.0,
    )
    m = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    by = scale * 1.4426950408889634

    if REST:
        codes = code + b * code_b + h * code_h + block.to(tl.int64) * columns
        rest_row = head.to(tl.int64) * columns
        if WEIGHT != 0:
            half = query.to(tl.float32) * scale
            square = (half * half).to(query.dtype)
        for first in tl.range(0, columns, BN, num_stages=2):
            number = first + tl.arange(0, BN)
            known = number < columns
            kind = tl.load(codes + number, mask=known, other=0)
            bias = tl.load(
                rest_bias + b * bias_b + h * bias_h + number, mask=known, other=float("-inf")
            )
            at_row = (rest_row + number)[:, None] * D + depth[None, :]
            k = tl.load(rest_k + at_row, mask=known[:, None], other=0.0)
            logits = tl.dot(query, k.T, input_precision=PRECISION) * by
            if WEIGHT != 0:
                var = tl.load(rest_var + at_row, mask=known[:, None], other=0.0)
                shift = tl.dot(square, var.T, input_precision=PRECISION)
                if WEIGHT == 1:
                    logits += tl.math.log2(1.0 + shift)
                else:
                    logits += shift * 1.4426950408889634
            logits += tl.where(kind == -1, bias, float("-inf"))[None, :]
            p, m, mass, acc = _weigh(logits, m, mass, acc)
            v = tl.load(rest_v + at_row, mask=known[:, None], other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        if FIRST_ORDER:
            at_cov = head.to(tl.int64) * D * D + depth[:, None] * D + depth[None, :]
            first_order = tl.dot(query, tl.load(cov + at_cov), input_precision=PRECISION)
            acc += first_order * mass[:, None]

    row = head.to(tl.int64) * rows + block
    entries = listed + row * num_tiles
    full = tl.load(counts + row * 2)
    every = tl.load(counts + row * 2 + 1)
    base = head * table
    entry = tl.load(entries)
    for i in tl.range(0, full, num_stages=STAGES):
        ahead = tl.load(entries + i + 1)
        start = base + (entry >> _BITS)
        k = keys.load([start, 0])
        logits = tl.dot(query, k.T, input_precision=PRECISION) * by
        p, m, mass, acc = _weigh(logits, m, mass, acc)
        v = values.load([start, 0])
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        entry = ahead
    for i in tl.range(full, every, num_stages=STAGES):
        ahead = tl.load(entries + i + 1)
        start = base + (entry >> _BITS)
        k = keys.load([start, 0])
        logits = tl.dot(query, k.T, input_precision=PRECISION) * by
        known = tl.arange(0, BN) < (entry & _MASK)
        pooled = ((entry >> _COUNT) & 7) + 1
        logits = tl.where(
            known[None, :], logits + tl.math.log2(pooled.to(tl.float32)), float("-inf")
        )
        p, m, mass, acc = _weigh(logits, m, mass, acc)
        v = values.load([start, 0])
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        entry = ahead

    total = tl.where(mass == 0.0, 1.0, mass)
    result = acc / total[:, None]
    norm = (m + tl.math.log2(mass)) * 0.6931471805599453
    norm = tl.where(mass == 0.0, float("-inf"), norm)
    tl.store(
        out + b * out_b + h * out_h + token[:, None] * out_l + depth[None, :],
        result.to(out.dtype.element_ty),
        mask=inside[:, None],
    )
    tl.store(lse + head.to(tl.int64) * length + token, norm, mask=inside)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    code: Tensor,
    *,
    q_perm: Tensor,
    q_offsets: Tensor,
    k_perm: Tensor,
    k_offsets: Tensor,
    key_valid: Tensor | None,
    scale: float,
    rest: RestTerms | None,
    q_longest: int | None = None,
    k_longest: int | None = None,
    levels: tuple[int, ...] = (),
    onto: tuple[Tensor, Tensor] | None = None,
    setting: dict[str, Any] | None = None,
    into: tuple[Tensor, Tensor] | None = None,
    pairs: Tensor | None = None,
    long_rows: int = 0,
) -> tuple[Tensor, Tensor]:
    if into is None:
        into = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    if pairs is None:
        pairs = torch.empty(q.shape[:2], dtype=torch.int64, device=q.device)
    chosen = {**_setting(q, k_longest), **(setting or {})}
    bm, bn, on_hopper = chosen.pop("BM"), chosen.pop("BN"), chosen.pop("hopper")
    queries, keys = compact(q_perm, q_offsets, None), compact(k_perm, k_offsets, key_valid)
    q_tiles = tiles_of(queries, q.shape[2], bm, q_longest)
    # blocks that fit a tile are one each
    long_tiles = long_rows if q_longest is not None and q_longest <= bm else 0
    code = code.contiguous()
    length = k.shape[2]
    if levels and on_hopper:
        from dit_accel.kernels.block_attention import hopper

        found = remembered(
            keys.perm,
            keys.offsets,
            ("levels", bn, k_longest),
            lambda: rows_of(keys.offsets, length, bn, k_longest),
        )
        out, lse = into
        for some in head_groups(k, found, whole=rest is not None):
            part = level_problem(some, q, k, v, code, queries, q_tiles, keys, found, bn, pairs)
            part = part._replace(scale=scale, out=some(out), lse=some(lse))
            before = None if onto is None else (some(onto[0]), some(onto[1]))
            hopper.attend(part, rest, bn, before, levels=True, long_tiles=long_tiles)
        return out, lse
    pyramid = None
    if levels:
        pyramid = remembered(
            keys.perm,
            keys.offsets,
            ("pooled", levels, k_longest),
            lambda: pooled(keys.offsets, length, levels, _POOLED_TILE, k_longest),
        )
    tables = tables_of(k, v, keys, pyramid, pairs)
    of_rows = queries.offsets, pairs, q.shape[1]
    if k_longest is None:
        listed, counts = packed_runs(code, keys.offsets, *of_rows, length, bn, AHEAD)
    else:
        listed, counts = packed(code, tiles_of(keys, length, bn, k_longest), *of_rows, bn)
    problem = Problem(
        q if q.stride(-1) == 1 else q.contiguous(),
        *tables,
        queries,
        q_tiles,
        listed,
        counts,
        pairs,
        code,
        scale,
        *into,
    )

    def attend(problem: Problem, rest: RestTerms | None, size: int, onto: Any) -> None:
        # a first-order term goes by the rest's share of the mass, and `onto` would be part of it
        within = on_hopper and (rest is None or rest.cov_sum is None)
        if on_hopper:
            from dit_accel.kernels.block_attention import hopper

            above = onto if within else None
            hopper.attend(problem, rest, size, above, long_tiles=long_tiles)
        else:
            _attend(problem, rest, bm, size, chosen)
        if onto is not None and not within:
            made = merge(problem.out, problem.lse, *onto)
            for mine, new in zip((problem.out, problem.lse), made, strict=True):
                mine.copy_(new)

    attend(problem, rest, bn, onto)
    if pyramid is not None:
        for part in pooled_parts(problem, pyramid, _POOLED_TILE):
            attend(part, None, _POOLED_TILE, (part.out.clone(), part.lse.clone()))
    return problem.out, problem.lse


def _attend(
    problem: Problem,
    rest: RestTerms | None,
    bm: int,
    bn: int,
    options: dict[str, Any],
) -> None:
    q, depth = problem.q, problem.q.shape[3]
    described = [
        TensorDescriptor.from_tensor(x.view(-1, depth), [bn, depth])
        for x in (problem.keys, problem.values)
    ]
    terms = rest_tables(rest, q, problem.scale)
    launch(
        attend_kernel,
        problem.grid,
        (
            q,
            *described,
            problem.queries.perm,
            *problem.q_tiles,
            problem.listed,
            problem.counts,
            problem.code,
            *(terms[name] for name in ("k", "v", "var", "bias", "cov")),
            problem.out,
            problem.lse,
        ),
        (
            *q.shape[1:3],
            problem.keys.shape[2],
            *problem.code.shape[2:],
            problem.listed.shape[-1],
            problem.grid[0],
            problem.scale,
            *q.stride()[:3],
            *lead_strides(problem.queries.perm),
            *lead_strides(problem.q_tiles.span),
            *lead_strides(problem.code),
            *lead_strides(terms["bias"]),
            *problem.out.stride()[:3],
        ),
        D=depth,
        BM=bm,
        BN=bn,
        REST=rest is not None,
        WEIGHT=0 if rest is None else WEIGHTS[rest.weight],
        FIRST_ORDER=rest is not None and rest.cov_sum is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **options,
    )


def _setting(q: Tensor, k_longest: int | None) -> dict[str, Any]:
    """How the kernels are launched: tiles, warps, stages; whether Hopper's own takes the tiles.

    Keys are cut into tiles of 64 where blocks are as long, and into tiles of 16, of which Hopper's
    kernel puts several together, where blocks may have any length.
    """
    wide = q.dtype.itemsize > 2
    hopper = not wide and q.shape[-1] in HEAD_SIZES and is_hopper(q.device)
    return {
        "BM": 64 if wide else 128,
        "BN": 32 if wide else 16 if hopper and k_longest is None else 64,
        "STAGES": 2,
        "num_warps": 4 if wide else 8,
        "hopper": hopper,
    }


def _specimen(name: str, dtype: str, depth: int, rest: bool, setting: dict[str, Any]) -> Specimen:
    signature = {
        **dict.fromkeys(("q", "rest_k", "rest_v", "rest_var", "cov", "out"), f"*{dtype}"),
        **dict.fromkeys(("q_perm", "q_block", "q_span", "listed", "counts"), "*i32"),
        "code": "*i8",
        "rest_bias": "*fp32",
        "lse": "*fp32",
        "scale": "fp32",
        "keys": f"tensordesc<{dtype}[{setting['BN']}, {depth}]>",
        "values": f"tensordesc<{dtype}[{setting['BN']}, {depth}]>",
    }
    constants = {
        "D": depth,
        "BM": setting["BM"],
        "BN": setting["BN"],
        "STAGES": setting["STAGES"],
        "REST": rest,
        "WEIGHT": 1 if rest else 0,
        "FIRST_ORDER": rest,
        "PRECISION": "tf32",
    }
    names = attend_kernel.arg_names
    signature |= {n: "i32" for n in names if n not in signature and n not in constants}
    options = {key: setting[key] for key in setting if key not in constants}
    return Specimen(name, attend_kernel, signature, constants, options)


SPECIMENS = (
    PLAN_SPECIMENS
    + LEVEL_SPECIMENS
    + RUN_SPECIMENS
    + TABLE_SPECIMENS
    + (
        [
            _specimen(
                f"attend {dtype} D{depth}{' rest' if rest else ''}",
                dtype,
                depth,
                rest,
                {"BM": 128, "BN": 64, "STAGES": 2, "num_warps": 8},
            )
            for dtype in ("bf16", "fp16")
            for depth in (64, 128)
            for rest in (False, True)
        ]
        if isinstance(attend_kernel, triton.JITFunction)
        else []
    )
)
