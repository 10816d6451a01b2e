"""The block statistics as kernels, keys and values gathered as they are read.

Blocks that fit a tile, which a caller must know, are read once for their means; their
covariances, in bf16, take another pass without any mean (`products`). The means of long blocks are
made by the piece (`long`). Blocks of any length, and covariances in other dtypes, go the plain way
(`plain`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_summary.api import BlockSummary
from dit_accel.kernels.block_summary.common import (
    SIZES,
    capability_of,
    room_for,
    specimen,
    strides_of,
)
from dit_accel.kernels.block_summary.long import LONG, long_means
from dit_accel.kernels.block_summary.long import SPECIMENS as LONG_SPECIMENS
from dit_accel.kernels.block_summary.plain import SPECIMENS as PLAIN_SPECIMENS
from dit_accel.kernels.block_summary.plain import plainly
from dit_accel.kernels.block_summary.products import SPECIMENS as PRODUCT_SPECIMENS
from dit_accel.kernels.block_summary.products import covariances
from dit_accel.kernels.launch import launch
from dit_accel.kernels.packed import Compact, compact, remembered
from dit_accel.kernels.specimen import Specimen

_TILE = 64
"""Tokens of a block that products are made of."""
_LONGEST = 128
"""Tokens of a block that is read at once."""
_LATE = (torch.bfloat16,)
"""Dtypes that lose nothing when means are subtracted from sums of products."""


@triton.jit(do_not_specialize=[n for n in SIZES if n != "num_video"])
def mean_kernel(
    k,
    v,
    perm,
    offsets,
    k_mean,
    v_mean,
    k_var,
    heads,
    blocks,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    perm_b,
    perm_h,
    offset_b,
    offset_h,
    D: tl.constexpr,
    TILE: tl.constexpr,
    VALUES: tl.constexpr,
    VAR: tl.constexpr,
):
    """A block that fits a tile."""
    j, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    depth = tl.arange(0, D)
    bounds = offsets + b * offset_b + h * offset_h
    start, stop = tl.load(bounds + j), tl.load(bounds + j + 1)
    place = start + tl.arange(0, TILE)
    known = (place < stop)[:, None]
    token = tl.load(perm + b * perm_b + h * perm_h + place, mask=place < stop, other=0)
    token = token.to(tl.int64)[:, None]
    keys, values = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    rows = tl.load(keys + token * k_l + depth[None, :], mask=known, other=0.0).to(tl.float32)
    by = 1.0 / tl.maximum(stop - start, 1).to(tl.float32)
    at = (head.to(tl.int64) * blocks + j) * D + depth
    mean = tl.sum(rows, 0) * by
    tl.store(k_mean + at, mean)
    if VALUES:
        others = tl.load(values + token * v_l + depth[None, :], mask=known, other=0.0)
        tl.store(v_mean + at, tl.sum(others.to(tl.float32), 0) * by)
    if VAR:
        centred = tl.where(known, rows - mean[None, :], 0.0)
        tl.store(k_var + at, tl.sum(centred * centred, 0) * by)


@torch.no_grad()
def block_mean(
    x: Tensor, perm: Tensor, offsets: Tensor, valid: Tensor | None, longest: int | None = None
) -> Tensor:
    made, _ = _run(x, x, perm, offsets, 0, valid, longest, values=False, var=False, cov=False)
    mean: Tensor = made["k_mean"]
    return mean


@torch.no_grad()
def block_summary(
    k: Tensor,
    v: Tensor,
    perm: Tensor,
    offsets: Tensor,
    num_video: int,
    key_valid: Tensor | None,
    want_var: bool,
    want_cov: bool,
    longest: int | None = None,
) -> BlockSummary:
    made, bounds = _run(
        k, v, perm, offsets, num_video, key_valid, longest, values=True, var=want_var, cov=want_cov
    )
    counts = remembered(perm, bounds, "counts", lambda: bounds.diff(dim=-1).long())
    return BlockSummary(counts, **made)


def _run(
    k: Tensor,
    v: Tensor,
    perm: Tensor,
    offsets: Tensor,
    num_video: int,
    valid: Tensor | None,
    longest: int | None,
    *,
    values: bool,
    var: bool,
    cov: bool,
) -> tuple[dict[str, Any], Tensor]:
    order = compact(perm, offsets, valid)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    made: dict[str, Any] = dict.fromkeys(("k_mean", "v_mean", "k_var", "cov_sum", "cov_norm"))
    if longest is not None and longest <= _LONGEST:
        tile = max(16, triton.next_power_of_2(longest))
        late = tile <= _TILE and k.dtype in _LATE and capability_of(k.device) >= (9, 0)
        if late or not cov:
            made |= _means(k, v, order, tile, values=values, var=var)
            if cov:
                made |= covariances(k, v, order, num_video, tile, made["k_mean"], made["v_mean"])
            return made, order.offsets
    if longest is not None and longest >= LONG and not var and not cov and offsets.shape[-1] > 1:
        return made | long_means(k, v, order, longest, values=values), order.offsets
    return made | plainly(k, v, order, num_video, values, var, cov), order.offsets


def _means(
    k: Tensor, v: Tensor, order: Compact, tile: int, *, values: bool, var: bool
) -> dict[str, Tensor]:
    batch, heads, _, depth = k.shape
    blocks = order.offsets.shape[-1] - 1
    names = ("k_mean", *(("v_mean",) * values), *(("k_var",) * var))
    made = room_for(k, blocks, *names)
    mean = made["k_mean"]
    if blocks:
        launch(
            mean_kernel,
            (blocks, batch * heads),
            # what is not wanted is never written, but must be somewhere
            (k, v, *order, mean, made.get("v_mean", mean), made.get("k_var", mean)),
            (heads, blocks, *strides_of(k, v, order)),
            **_mean_constants(depth, tile, values, var),
        )
    return made


def _mean_constants(depth: int, tile: int, values: bool, var: bool) -> dict[str, int]:
    warps = 1 if tile * depth < 8192 else 2
    if var and tile * depth > 8192:
        warps = 8  # a tile stays in registers
    return {"D": depth, "TILE": tile, "VALUES": values, "VAR": var, "num_warps": warps}


def _specimens() -> Iterator[Specimen]:
    for depth in (64, 128):
        for tile in (64, 128):
            for switch in (False, True):
                yield specimen(
                    mean_kernel,
                    f"means D{depth} tile {tile}{' values var' * switch}",
                    "bf16",
                    _mean_constants(depth, tile, switch, switch),
                )


SPECIMENS = (
    [*_specimens(), *PRODUCT_SPECIMENS, *LONG_SPECIMENS, *PLAIN_SPECIMENS]
    if isinstance(mean_kernel, triton.JITFunction)
    else []
)
