"""Means of long blocks: by pieces, since one program for a block would leave processors idle."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_summary.common import SIZES, room_for, specimen, strides_of
from dit_accel.kernels.block_summary.plain import _rows
from dit_accel.kernels.launch import launch
from dit_accel.kernels.packed import Compact
from dit_accel.kernels.specimen import Specimen

LONG = 512
"""Tokens of a block from which on it is taken by the piece."""
_PIECE = 256
"""Tokens of a piece."""
_TILE = 32
"""Tokens that are read at once."""
_SIZES = [name for name in SIZES if name != "num_video"]


@triton.jit(do_not_specialize=_SIZES)
def piece_kernel(
    k, v, perm, offsets, sums,
    heads, blocks, k_b, k_h, k_l, v_b, v_h, v_l, perm_b, perm_h, offset_b, offset_h,
    D: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Sums over a piece of a block; zero where a block has no such piece."""
    piece, j, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    depth = tl.arange(0, D)
    keys, values = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    order = perm + b * perm_b + h * perm_h
    bounds = offsets + b * offset_b + h * offset_h
    start = tl.load(bounds + j) + piece * PIECE
    stop = tl.minimum(tl.load(bounds + j + 1), start + PIECE)
    k_sum, v_sum = tl.zeros([TILE, D], tl.float32), tl.zeros([TILE, D], tl.float32)
    for first in range(start, stop, TILE):
        place = first + tl.arange(0, TILE)
        k_sum += _rows(keys, order, place, stop, depth, k_l, D, TILE).to(tl.float32)
        if VALUES:
            v_sum += _rows(values, order, place, stop, depth, v_l, D, TILE).to(tl.float32)
    at = (head.to(tl.int64) * blocks + j) * tl.num_programs(0) + piece
    tl.store(sums + at * D + depth, tl.sum(k_sum, 0))
    if VALUES:
        at += tl.num_programs(2).to(tl.int64) * blocks * tl.num_programs(0)
        tl.store(sums + at * D + depth, tl.sum(v_sum, 0))


@triton.jit(do_not_specialize=["heads", "blocks", "pieces", "offset_b", "offset_h"])
def whole_kernel(
    offsets, sums, k_mean, v_mean, heads, blocks, pieces, offset_b, offset_h,
    D: tl.constexpr, TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The mean of a block from the sums of its pieces."""
    j, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    bounds = offsets + b * offset_b + h * offset_h
    count = tl.load(bounds + j + 1) - tl.load(bounds + j)
    by = 1.0 / tl.maximum(count, 1).to(tl.float32)
    depth = tl.arange(0, D)
    at = head.to(tl.int64) * blocks + j
    k_sum, v_sum = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for first in range(0, pieces, TILE):
        piece = first + tl.arange(0, TILE)
        where = (at * pieces + piece)[:, None] * D + depth[None, :]
        inside = (piece < pieces)[:, None]
        k_sum += tl.sum(tl.load(sums + where, mask=inside, other=0.0), 0)
        if VALUES:
            where += tl.num_programs(1).to(tl.int64) * blocks * pieces * D
            v_sum += tl.sum(tl.load(sums + where, mask=inside, other=0.0), 0)
    tl.store(k_mean + at * D + depth, k_sum * by)
    if VALUES:
        tl.store(v_mean + at * D + depth, v_sum * by)


def long_means(
    k: Tensor, v: Tensor, order: Compact, longest: int, *, values: bool
) -> dict[str, Tensor]:
    """Means by name, of keys and, if wanted, of values.

    Args:
        k, v: ``[B, H, L, D]``, with a last stride of 1.
        order: the blocks.
        longest: tokens of the longest block, or more.
        values: whether those of the values are wanted too.
    """
    batch, heads, _, depth = k.shape
    blocks = order.offsets.shape[-1] - 1
    made = room_for(k, blocks, "k_mean", *(("v_mean",) * values))
    pieces = triton.cdiv(longest, _PIECE)
    shape = (1 + values, batch * heads, blocks, pieces, depth)
    sums = torch.empty(shape, dtype=torch.float32, device=k.device)
    strides = strides_of(k, v, order)
    launch(
        piece_kernel,
        (pieces, blocks, batch * heads),
        (k, v, *order, sums),
        (heads, blocks, *strides),
        **_constants(depth, values),
        PIECE=_PIECE,
    )
    mean = made["k_mean"]
    launch(
        whole_kernel,
        (blocks, batch * heads),
        (order.offsets, sums, mean, made.get("v_mean", mean)),
        (heads, blocks, pieces, *strides[-2:]),
        **_constants(depth, values),
    )
    return made


def _constants(depth: int, values: bool) -> dict[str, int]:
    return {"D": depth, "TILE": _TILE, "VALUES": values, "num_warps": 4}


def _specimens() -> Iterator[Specimen]:
    for depth in (64, 128):
        constants = {**_constants(depth, True), "PIECE": _PIECE}
        yield specimen(piece_kernel, f"piece D{depth}", "bf16", constants)
        yield specimen(whole_kernel, f"whole D{depth}", "bf16", _constants(depth, True))


SPECIMENS = list(_specimens()) if isinstance(piece_kernel, triton.JITFunction) else []
