"""Covariances of blocks that fit a tile, from sums of products that no mean was taken from.

With ``P`` what subtracts the mean, ``Σ_j (P K_j)ᵀ V_j = Σ_j K_jᵀ V_j - Σ_j n_j k̄_j v̄_jᵀ``
accumulates in the tensor cores over many blocks, and ``‖(P K)ᵀ V‖² = Σ (K Kᵀ P) ∘ (P V Vᵀ)`` needs
Gram matrices as small as a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_summary.common import SIZES, capability_of, specimen, strides_of
from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import Compact
from dit_accel.kernels.specimen import Specimen

_LONG_RUN = 64
"""Blocks of a program, which leaves a ``D × D`` sum of its own."""
_ROWS = 16
"""Rows of a covariance that a program finishes."""


@triton.jit(do_not_specialize=[*SIZES, "video_parts"])
def cov_kernel(
    k,
    v,
    perm,
    offsets,
    cov_norm,
    cov_part,
    heads,
    blocks,
    num_video,
    video_parts,
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
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
):
    """A run of blocks, all of the video or all of the text."""
    part, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    first = part * RUN
    last = tl.minimum(first + RUN, num_video)
    if part >= video_parts:
        first = num_video + (part - video_parts) * RUN
        last = tl.minimum(first + RUN, blocks)
    depth = tl.arange(0, D)
    lane = tl.arange(0, TILE)
    keys, values = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    order = perm + b * perm_b + h * perm_h
    bounds = offsets + b * offset_b + h * offset_h
    total = tl.zeros([D, D], tl.float32)
    start, stop = tl.load(bounds + first), tl.load(bounds + tl.minimum(first + 1, blocks))
    for j in tl.range(first, last, num_stages=STAGES):
        next_start = tl.load(bounds + j + 1)
        next_stop = tl.load(bounds + tl.minimum(j + 2, blocks))
        count = stop - start
        inside = lane < count
        token = tl.load(order + start + lane, mask=inside, other=0).to(tl.int64)
        rows = tl.load(
            keys + token[:, None] * k_l + depth[None, :], mask=inside[:, None], other=0.0
        )
        others = tl.load(
            values + token[:, None] * v_l + depth[None, :], mask=inside[:, None], other=0.0
        )
        share = 1.0 / tl.maximum(count, 1).to(tl.float32)
        total = tl.dot(tl.trans(rows), others, total)
        own = tl.dot(rows, tl.trans(rows))
        own -= (tl.sum(own, 0) * share)[None, :]
        other = tl.dot(others, tl.trans(others))
        other -= (tl.sum(other, 1) * share)[:, None]
        square = tl.sum(own * other) if FLAT else tl.sum(tl.sum(own * other, 1), 0)
        square = tl.maximum(square, 0.0)
        tl.store(cov_norm + head.to(tl.int64) * blocks + j, tl.sqrt(square))
        start = next_start
        stop = next_stop
    if part < video_parts:
        at_part = head.to(tl.int64) * video_parts + part
        row = tl.arange(0, D)
        tl.store(cov_part + at_part * D * D + row[:, None] * D + depth[None, :], total)


@triton.jit(do_not_specialize=["heads", "blocks", "num_video", "parts", "offset_b", "offset_h"])
def finish_kernel(
    cov_part,
    k_mean,
    v_mean,
    offsets,
    cov_sum,
    heads,
    blocks,
    num_video,
    parts,
    offset_b,
    offset_h,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Some rows of the parts' sum, less what the means of keys add to it."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, D)
    bounds = offsets + head // heads * offset_b + head % heads * offset_h
    total = tl.zeros([ROWS, D], tl.float32)
    square = row[:, None] * D + depth[None, :]
    for part in range(parts):
        total += tl.load(cov_part + (head * parts + part) * D * D + square)
    for first in range(0, num_video, STEP):
        some = first + tl.arange(0, STEP)
        known = some < num_video
        size = tl.load(bounds + some + 1, mask=known, other=0)
        size -= tl.load(bounds + some, mask=known, other=0)
        at = head * blocks + some
        keys = tl.load(k_mean + at[None, :] * D + row[:, None], mask=known[None, :], other=0.0)
        keys *= size.to(tl.float32)[None, :]
        values = tl.load(v_mean + at[:, None] * D + depth[None, :], mask=known[:, None], other=0.0)
        total -= tl.dot(keys, values, input_precision="ieee")
    tl.store(cov_sum + head * D * D + square, total)


def covariances(
    k: Tensor, v: Tensor, order: Compact, num_video: int, tile: int, k_mean: Tensor, v_mean: Tensor
) -> dict[str, Tensor]:
    """The sum over the video's blocks, and the norms of all, from their means."""
    batch, heads, _, depth = k.shape
    blocks = order.offsets.shape[-1] - 1
    # runs of the video and runs of the text: no sum is of both
    video_parts = -(-num_video // _LONG_RUN)
    parts = video_parts - (num_video - blocks) // _LONG_RUN

    def new(*shape: int) -> Tensor:
        return torch.empty((batch, heads, *shape), dtype=torch.float32, device=k.device)

    part, norm, total = new(video_parts, depth, depth), new(blocks), new(depth, depth)
    if parts:
        launch(
            cov_kernel,
            (parts, batch * heads),
            (k, v, *order, norm, part),
            (heads, blocks, num_video, video_parts, *strides_of(k, v, order)),
            **_cov_constants(depth, tile, flat=capability_of(k.device) >= (10, 0)),
        )
    launch(
        finish_kernel,
        (max(1, depth // _ROWS), batch * heads),
        (part, k_mean, v_mean, order.offsets, total),
        (heads, blocks, num_video, video_parts, *lead_strides(order.offsets)),
        **_finish_constants(depth),
    )
    return {"cov_sum": total, "cov_norm": norm}


def _cov_constants(depth: int, tile: int, *, flat: bool) -> dict[str, int]:
    # Triton 3.6 fails to compile two sums in turn for Blackwell, and spills one for Hopper
    return {
        **{"D": depth, "TILE": tile, "RUN": _LONG_RUN, "STAGES": 3, "FLAT": flat, "num_warps": 4}
    }


def _finish_constants(depth: int) -> dict[str, int]:
    return {"D": depth, "ROWS": min(depth, _ROWS), "STEP": 32, "num_warps": 4}


def _specimens() -> Iterator[Specimen]:
    for depth in (64, 128):
        for tile in (16, 64):
            for flat, least, most in ((False, 90, 90), (True, 100, 100)):
                one = specimen(
                    cov_kernel,
                    f"cov D{depth} tile {tile}",
                    "bf16",
                    _cov_constants(depth, tile, flat=flat),
                )
                yield replace(one, least=least, most=most)
        yield specimen(finish_kernel, f"finish D{depth}", "bf16", _finish_constants(depth))


SPECIMENS = list(_specimens()) if isinstance(cov_kernel, triton.JITFunction) else []
