"""What the kernels of block attention read of a rest, in the inputs' dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_attention.api import RestTerms
from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed

_ROWS = 32
"""Rows of a table that a program makes."""


@triton.jit(do_not_specialize=["heads", "blocks", "num_video", "count_b", "count_h"])
def tables_kernel(
    k_mean,
    v_mean,
    k_var,
    cov_sum,
    count,
    keys,
    values,
    spread,
    cov,
    bias,
    heads,
    blocks,
    num_video,
    scale,
    count_b,
    count_h,
    VAR: tl.constexpr,
    COV: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Means, halves of variances and biases of some blocks; behind these, rows of ``s C / L``."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    counts = count + head // heads * count_b + head % heads * count_h
    of_blocks = tl.cdiv(blocks, ROWS)
    depth = tl.arange(0, D)[None, :]
    if part < of_blocks:
        row = part * ROWS + tl.arange(0, ROWS)
        inside = row < blocks
        where = (head * blocks + row)[:, None] * D + depth
        mask = inside[:, None]
        key = tl.load(k_mean + where, mask=mask, other=0.0)
        tl.store(keys + where, key.to(keys.dtype.element_ty), mask=mask)
        value = tl.load(v_mean + where, mask=mask, other=0.0)
        tl.store(values + where, value.to(values.dtype.element_ty), mask=mask)
        if VAR:
            half = tl.load(k_var + where, mask=mask, other=0.0) * 0.5
            tl.store(spread + where, half.to(spread.dtype.element_ty), mask=mask)
        number = tl.load(counts + row, mask=inside, other=0).to(tl.float32)
        weight = tl.where(number > 0, tl.log2(tl.maximum(number, 1.0)), float("-inf"))
        tl.store(bias + head * blocks + row, weight, mask=inside)
    elif COV:
        line = (part - of_blocks) * ROWS + tl.arange(0, ROWS)
        cell = (head * D + line)[:, None] * D + depth
        tokens = tl.zeros([256], tl.int32)
        for first in range(0, num_video, 256):
            block = first + tl.arange(0, 256)
            tokens += tl.load(counts + block, mask=block < num_video, other=0).to(tl.int32)
        by = scale / tl.maximum(tl.sum(tokens, 0), 1).to(tl.float32)
        beyond = (line >= D)[:, None]
        total = tl.load(cov_sum + cell, mask=beyond == 0, other=0.0) * by
        tl.store(cov + cell, total.to(cov.dtype.element_ty), mask=beyond == 0)


def rest_tables(rest: RestTerms | None, like: Tensor, scale: float) -> dict[str, Tensor]:
    """Tables of the rest in the inputs' dtype; logits' parts in powers of two.

    Returns:
        ``rows`` ``[R, D]``, all of them, of which the others are parts, of every head by turns: the
        means ``k`` and ``v``, then what is used of halves of variances ``var`` and of ``s C / L``,
        ``cov``. Beside these ``bias``, fp32 ``[B, H, Nk]``.
    """
    if rest is None:
        bias = torch.empty((1, 1, 1), dtype=torch.float32, device=like.device)
        return {**dict.fromkeys(("rows", "k", "v", "var", "cov"), like), "bias": bias}
    batch, heads, blocks, depth = rest.k_mean.shape
    weighed = rest.weight != "plain" and rest.k_var is not None
    first_order = rest.cov_sum is not None
    sizes = [blocks, blocks, blocks if weighed else 0, depth if first_order else 0]
    pairs = batch * heads
    rows = torch.empty((pairs * sum(sizes), depth), dtype=like.dtype, device=like.device)
    keys, values, spread, cov = rows.split([pairs * size for size in sizes])
    bias = torch.empty((batch, heads, blocks), dtype=torch.float32, device=like.device)
    k_mean, v_mean, count = (x.contiguous() for x in (rest.k_mean, rest.v_mean, rest.count))
    k_var = k_mean if rest.k_var is None else rest.k_var.contiguous()
    cov_sum = k_mean if rest.cov_sum is None else rest.cov_sum.contiguous()
    parts = -(-blocks // _ROWS) + (-(-depth // _ROWS) if first_order else 0)
    launch(
        tables_kernel,
        (parts, batch * heads),
        (k_mean, v_mean, k_var, cov_sum, count, keys, values, spread, cov, bias),
        (heads, blocks, rest.num_video, float(scale), *lead_strides(count)),
        VAR=weighed,
        COV=first_order,
        D=depth,
        ROWS=_ROWS,
        num_warps=4,
    )
    return {"rows": rows, "k": keys, "v": values, "var": spread, "cov": cov, "bias": bias}


def _specimen(dtype: str, depth: int) -> Specimen:
    constants = {"VAR": True, "COV": True, "D": depth, "ROWS": _ROWS}
    types = {
        **dict.fromkeys(("k_mean", "v_mean", "k_var", "cov_sum", "bias"), "*fp32"),
        **dict.fromkeys(("keys", "values", "spread", "cov"), f"*{dtype}"),
        **{"count": "*i64", "scale": "fp32"},
    }
    signature = typed(tables_kernel, constants, **types)
    name = f"tables of the rest {dtype} D{depth}"
    return Specimen(name, tables_kernel, signature, constants, {"num_warps": 4})


SPECIMENS = [_specimen("bf16", 128)] if isinstance(tables_kernel, triton.JITFunction) else []
