"""Gates as the kernels of the selection make them: a tile of tokens with some blocks."""

from __future__ import annotations

import triton
import triton.language as tl

BITS = 24
"""Normalised gates are whole numbers of so many bits."""
TOP = tl.constexpr(2**BITS - 1)


@triton.jit
def gates(query, mean_ptr, fine_ptr, full_ptr, column, inside, low, scale,
          D: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Gates ``[BM, BN]`` as they are, and as whole numbers; which blocks count."""
    depth = tl.arange(0, D)
    where = column[None, :] * D + depth[:, None]
    mean = tl.load(mean_ptr + where, mask=inside[None, :], other=0.0)
    gate = tl.dot(query, mean, input_precision="ieee")
    if SPLIT:
        fine = tl.load(fine_ptr + where, mask=inside[None, :], other=0.0)
        gate = tl.dot(query, fine, gate)
    full = tl.load(full_ptr + column, mask=inside, other=0) != 0
    number = tl.minimum(tl.maximum((gate - low) * scale + 0.5, 0.0), TOP).to(tl.int32)
    return gate, number, full


@triton.jit
def tokens(q_ptr, q_l, start, stop, length, step, D: tl.constexpr, BM: tl.constexpr):
    """A tile of queries, every ``step``-th, and which of them select."""
    token = (tl.program_id(0) * BM + tl.arange(0, BM)) * step
    there = (token < length) & ((token < start) | (token >= stop))
    depth = tl.arange(0, D)
    query = tl.load(
        q_ptr + token.to(tl.int64)[:, None] * q_l + depth[None, :], mask=there[:, None], other=0.0
    )
    return token, there, query
