"""Gates as the kernels of the selection make them: a tile of tokens with some blocks."""

from __future__ import annotations

import triton
import triton.language as tl

BITS = 24
"""Normalised gates are whole numbers of so many bits."""
TOP = tl.constexpr(2**BITS - 1)


@triton.jit
def values(query, mean_ptr, fine_ptr, column, inside, low, scale,
           D: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Gates ``[BM, BN]`` as they are, and normalised."""
    depth = tl.arange(0, D)
    where = column[None, :] * D + depth[:, None]
    mean = tl.load(mean_ptr + where, mask=inside[None, :], other=0.0)
    gate = tl.dot(query, mean, input_precision="ieee")
    if SPLIT:
        fine = tl.load(fine_ptr + where, mask=inside[None, :], other=0.0)
        gate = tl.dot(query, fine, gate)
    return gate, (gate - low) * scale + 0.5


@triton.jit
def gates(query, mean_ptr, fine_ptr, full_ptr, column, inside, low, scale,
          D: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Gates ``[BM, BN]`` as they are, and as whole numbers; which blocks count."""
    gate, value = values(query, mean_ptr, fine_ptr, column, inside, low, scale, D, SPLIT)
    full = tl.load(full_ptr + column, mask=inside, other=0) != 0
    return gate, tl.minimum(tl.maximum(value, 0.0), TOP).to(tl.int32), full


@triton.jit
def own_range(there, own, full_ptr, columns):
    """The first and the last block that a tile's tokens are in; all of them where some token or
    some block does not take part, so that those that do have to be told from the others."""
    every = tl.min(there.to(tl.int32), 0)
    for first in range(0, columns, 512):
        column = first + tl.arange(0, 512)
        full = tl.load(full_ptr + column, mask=column < columns, other=1) != 0
        every = tl.minimum(every, tl.min(full.to(tl.int32), 0))
    lowest = tl.where(every != 0, tl.min(own, 0), 0)
    return lowest, tl.where(every != 0, tl.max(own, 0), columns)


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
