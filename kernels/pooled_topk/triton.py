"""The plan as a kernel: scores of some rows, and the smallest that is taken, found bit by bit.

Where rows are long the scores are products of a library, some heads at a time.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed
from dit_accel.kernels.topk.triton import largest

_ROWS, _CHUNK = 16, 64
_NARROW = 256
"""Key blocks up to which one kernel makes the scores and chooses; with more it took 0.13 ms on
Wan 1.3B."""
_SCORE_BYTES = 32 * 2**20
_EACH = 4
"""Rows that a program chooses for where scores are there."""


@triton.jit(do_not_specialize=["heads", "all_rows", "blocks", "rows", "columns", "density_bits"])
def plan_kernel(
    q_mean,
    k_mean,
    count,
    norm,
    score,
    code,
    heads,
    all_rows,
    blocks,
    rows,
    columns,
    density_bits: tl.int64,
    scale,
    count_b,
    count_h,
    BIAS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = part * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, D)
    at = (head * all_rows + row)[:, None]
    query = tl.load(q_mean + at * D + depth[None, :], mask=(row < rows)[:, None], other=0.0) * scale
    counts = count + head // heads * count_b + head % heads * count_h
    for first in range(0, columns, CHUNK):
        column = first + tl.arange(0, CHUNK)
        known = column < columns
        where = (head * blocks + column)[:, None] * D + depth[None, :]
        key = tl.load(k_mean + where, mask=known[:, None], other=0.0)
        part_score = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        shift = tl.zeros([CHUNK], tl.float32)
        if BIAS:
            spread = tl.load(norm + head * blocks + column, mask=known, other=0.0)
            shift = tl.log(spread + 1e-5)
        full = tl.load(counts + column, mask=known, other=0) > 0
        part_score += tl.where(full, shift, float("-inf"))[None, :]
        inside = (row < all_rows)[:, None] & known[None, :]
        tl.store(score + at * blocks + column[None, :], part_score, mask=inside)
    # what other threads of this program wrote
    tl.debug_barrier()
    column = tl.arange(0, COLUMNS)
    chosen_from = column < columns
    mask = (row < rows)[:, None] & chosen_from[None, :]
    value = tl.load(score + at * blocks + column[None, :], mask=mask, other=float("-inf"))
    full = tl.load(counts + column, mask=chosen_from, other=0) > 0
    available = tl.sum(full.to(tl.int32), 0)
    share = (available.to(tl.float64) * density_bits.to(tl.float64, bitcast=True)).to(tl.int32)
    wanted = tl.zeros([ROWS], tl.int32) + tl.maximum(share, 1)
    exact = largest(value, wanted) | (mask == 0)
    kind = tl.where(exact, 1, -1).to(tl.int8)
    inside = (row < all_rows)[:, None] & (column < blocks)[None, :]
    tl.store(code + at * blocks + column[None, :], kind, mask=inside)


@triton.jit(
    do_not_specialize=[
        *("heads", "all_rows", "blocks", "rows", "columns", "density_bits", "first_pair"),
    ]
)
def choice_kernel(
    score,
    count,
    norm,
    code,
    heads,
    all_rows,
    blocks,
    rows,
    columns,
    density_bits: tl.int64,
    first_pair,
    scale,
    count_b,
    count_h,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    local = tl.program_id(1).to(tl.int64)
    pair = first_pair + local
    column = tl.arange(0, COLUMNS)[None, :]
    known = column < columns
    counts = count + pair // heads * count_b + pair % heads * count_h
    full = tl.load(counts + column, mask=known, other=0) > 0
    shift = tl.zeros([1, COLUMNS], tl.float32)
    if BIAS:
        shift = tl.log(tl.load(norm + pair * blocks + column, mask=known, other=0.0) + 1e-5)
    shift = tl.where(full, shift, float("-inf"))
    available = tl.sum(full.to(tl.int32), 1)
    share = (available.to(tl.float64) * density_bits.to(tl.float64, bitcast=True)).to(tl.int32)
    wanted = tl.maximum(share, 1)
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i + tl.arange(0, 1)[:, None]
        at = (local * rows + row) * columns + column
        value = tl.load(score + at, mask=known & (row < rows), other=0.0) * scale + shift
        exact = largest(value, wanted) | (known == 0) | (row >= rows)
        inside = (column < blocks) & (row < all_rows)
        where = (pair * all_rows + row) * blocks + column
        tl.store(code + where, tl.where(exact, 1, -1).to(tl.int8), mask=inside)


def pooled_topk(
    q_mean: Tensor,
    k_mean: Tensor,
    count: Tensor,
    norm: Tensor | None,
    rows: int,
    columns: int,
    scale: float,
    density: float,
) -> Tensor:
    batch, heads, all_rows, depth = q_mean.shape
    blocks = k_mean.shape[2]
    q_mean, k_mean, count = q_mean.contiguous(), k_mean.contiguous(), count.contiguous()
    code = torch.empty((batch, heads, all_rows, blocks), dtype=torch.int8, device=q_mean.device)
    density_bits = struct.unpack("<q", struct.pack("<d", density))[0]
    sizes = heads, all_rows, blocks, rows, columns, density_bits
    norm = None if norm is None else norm.contiguous()
    if blocks > _NARROW:
        _of_products(q_mean, k_mean, count, norm, code, sizes, float(scale))
        return code
    score = torch.empty(code.shape, dtype=torch.float32, device=code.device)
    wide = max(_CHUNK, triton.next_power_of_2(blocks))
    launch(
        plan_kernel,
        (-(-all_rows // _ROWS), batch * heads),
        (q_mean, k_mean, count, k_mean if norm is None else norm, score, code),
        (*sizes, float(scale), *lead_strides(count)),
        BIAS=norm is not None,
        D=depth,
        ROWS=_ROWS,
        CHUNK=_CHUNK,
        COLUMNS=wide,
        num_warps=_warps(wide, depth),
    )
    return code


@torch.no_grad()
def _of_products(
    q_mean: Tensor,
    k_mean: Tensor,
    count: Tensor,
    norm: Tensor | None,
    code: Tensor,
    sizes: tuple[int, ...],
    scale: float,
) -> None:
    """Write the plan from products of a library."""
    _, all_rows, blocks, rows, columns, _ = sizes
    query, key = q_mean.flatten(0, 1)[:, :rows], k_mean.flatten(0, 1)[:, :columns].mT
    pairs = query.shape[0]
    step = max(1, min(pairs, _SCORE_BYTES // max(1, 4 * rows * columns)))
    scores = torch.empty((step, rows, columns), dtype=torch.float32, device=code.device)
    for first in range(0, pairs, step):
        some = scores[: min(step, pairs - first)]
        torch.bmm(query[first : first + step], key[first : first + step], out=some)
        wide = triton.next_power_of_2(blocks)
        launch(
            choice_kernel,
            (-(-all_rows // _EACH), some.shape[0]),
            (scores, count, k_mean if norm is None else norm, code),
            (*sizes, first, scale, *lead_strides(count)),
            BIAS=norm is not None,
            ROWS=_EACH,
            COLUMNS=wide,
            num_warps=_choice_warps(wide),
        )


def _warps(columns: int, depth: int) -> int:
    # four hold no means of 128 channels in registers
    return 4 if columns <= 256 and depth <= 64 else 8


def _choice_warps(columns: int) -> int:
    return 4 if columns <= 2048 else 16


def _specimen(depth: int, columns: int) -> Specimen:
    constants = {"BIAS": True, "D": depth, "ROWS": _ROWS, "CHUNK": _CHUNK, "COLUMNS": columns}
    types = {
        **dict.fromkeys(("q_mean", "k_mean", "norm", "score"), "*fp32"),
        **{"count": "*i64", "code": "*i8", "density_bits": "i64", "scale": "fp32"},
    }
    signature = typed(plan_kernel, constants, **types)
    name = f"plan D{depth} of {columns}"
    return Specimen(name, plan_kernel, signature, constants, {"num_warps": _warps(columns, depth)})


def _choice_specimen(columns: int) -> Specimen:
    constants = {"BIAS": True, "ROWS": _EACH, "COLUMNS": columns}
    types = {
        **dict.fromkeys(("score", "norm"), "*fp32"),
        **{"count": "*i64", "code": "*i8", "density_bits": "i64", "scale": "fp32"},
    }
    signature = typed(choice_kernel, constants, **types)
    options = {"num_warps": _choice_warps(columns)}
    return Specimen(f"plan of {columns} scores", choice_kernel, signature, constants, options)


SPECIMENS = (
    [
        *(_specimen(128, 64), _specimen(64, 256), _specimen(128, 256)),
        *(_choice_specimen(columns) for columns in (512, 4096, 8192)),
    ]
    if isinstance(plan_kernel, triton.JITFunction)
    else []
)
