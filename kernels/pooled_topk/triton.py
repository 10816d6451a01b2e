"""The plan as a kernel: scores of some rows, and the smallest that is taken, found bit by bit."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed

_ROWS, _CHUNK = 16, 64


@triton.jit
def largest(value, count, COLUMNS: tl.constexpr):
    """The largest so many entries of every row; -inf is none, and of equals the first is taken.

    ``value`` fp32 ``[R, COLUMNS]``, ``count`` int32 ``[R]``.
    """
    finite = value > float("-inf")
    count = tl.minimum(count, tl.sum(finite.to(tl.int32), 1))
    # floats in their own order as whole numbers; zeros of both signs are equal
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    # the largest number that enough entries reach: its sign first, which turns the order around
    enough = tl.sum((key >= 0).to(tl.int32), 1) >= count
    least = tl.where(enough, 0, -2147483648)
    for step in tl.static_range(31):
        more = least | (1 << (30 - step))
        enough = tl.sum((key >= more[:, None]).to(tl.int32), 1) >= count
        least = tl.where(enough, more, least)
    above = finite & (key > least[:, None])
    equal = finite & (key == least[:, None])
    left = count - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= left[:, None]))


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
    exact = largest(value, wanted, COLUMNS) | (mask == 0)
    kind = tl.where(exact, 1, -1).to(tl.int8)
    inside = (row < all_rows)[:, None] & (column < blocks)[None, :]
    tl.store(code + at * blocks + column[None, :], kind, mask=inside)


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
    shape, device = (batch, heads, all_rows, blocks), q_mean.device
    score = torch.empty(shape, dtype=torch.float32, device=device)
    code = torch.empty(shape, dtype=torch.int8, device=device)
    wide = max(_CHUNK, 1 << (blocks - 1).bit_length())
    launch(
        plan_kernel,
        (-(-all_rows // _ROWS), batch * heads),
        (q_mean, k_mean, count, k_mean if norm is None else norm.contiguous(), score, code),
        (
            *(heads, all_rows, blocks, rows, columns),
            struct.unpack("<q", struct.pack("<d", density))[0],
            float(scale),
            *lead_strides(count),
        ),
        BIAS=norm is not None,
        D=depth,
        ROWS=_ROWS,
        CHUNK=_CHUNK,
        COLUMNS=wide,
        num_warps=_warps(wide, depth),
    )
    return code


def _warps(columns: int, depth: int) -> int:
    # four hold neither the scores of a longer row nor means of 128 channels in registers
    return 4 if columns <= 256 and depth <= 64 else 8


def _specimen(depth: int, columns: int) -> Specimen:
    constants = {"BIAS": True, "D": depth, "ROWS": _ROWS, "CHUNK": _CHUNK, "COLUMNS": columns}
    types = {
        **dict.fromkeys(("q_mean", "k_mean", "norm", "score"), "*fp32"),
        **{"count": "*i64", "code": "*i8", "density_bits": "i64", "scale": "fp32"},
    }
    signature = typed(plan_kernel, constants, **types)
    name = f"plan D{depth} of {columns}"
    return Specimen(name, plan_kernel, signature, constants, {"num_warps": _warps(columns, depth)})


SPECIMENS = (
    [_specimen(128, 64), _specimen(64, 256), _specimen(128, 1024)]
    if isinstance(plan_kernel, triton.JITFunction)
    else []
)
