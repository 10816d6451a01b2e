"""The block statistics the plain way: blocks of any length, read twice, a covariance for each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_summary.common import SIZES, room_for, specimen, strides_of
from dit_accel.kernels.launch import launch
from dit_accel.kernels.packed import Compact
from dit_accel.kernels.specimen import Specimen
from dit_accel.kernels.tuning import SPACES, Setting, setting


@triton.jit
def _rows(x, perm, place, stop, depth, stride, D: tl.constexpr, TILE: tl.constexpr):
    """Some tokens of a block, in fp32, zero beyond its end."""
    inside = place < stop
    token = tl.load(perm + place, mask=inside, other=0).to(tl.int64)
    where = x + token[:, None] * stride + depth[None, :]
    return tl.load(where, mask=inside[:, None], other=0.0)


@triton.jit(do_not_specialize=SIZES)
def summary_kernel(
    k,
    v,
    perm,
    offsets,
    k_mean,
    v_mean,
    k_var,
    cov_norm,
    cov_part,
    heads,
    blocks,
    num_video,
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
    VALUES: tl.constexpr,
    VAR: tl.constexpr,
    COV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    depth = tl.arange(0, D)
    keys, values = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    order = perm + b * perm_b + h * perm_h
    bounds = offsets + b * offset_b + h * offset_h
    if COV:
        total = tl.zeros([D, D], tl.float32)
    for j in range(part * RUN, tl.minimum(part * RUN + RUN, blocks)):
        start, stop = tl.load(bounds + j), tl.load(bounds + j + 1)
        by = 1.0 / tl.maximum(stop - start, 1).to(tl.float32)
        k_sum, v_sum = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
        for first in range(start, stop, TILE):
            place = first + tl.arange(0, TILE)
            rows = _rows(keys, order, place, stop, depth, k_l, D, TILE)
            k_sum += tl.sum(rows.to(tl.float32), 0)
            if VALUES:
                rows = _rows(values, order, place, stop, depth, v_l, D, TILE)
                v_sum += tl.sum(rows.to(tl.float32), 0)
        mean = k_sum * by
        at = head.to(tl.int64) * blocks + j
        tl.store(k_mean + at * D + depth, mean)
        if VALUES:
            tl.store(v_mean + at * D + depth, v_sum * by)
        if VAR or COV:
            spread = tl.zeros([D], tl.float32)
            if COV:
                cov = tl.zeros([D, D], tl.float32)
            for first in range(start, stop, TILE):
                place = first + tl.arange(0, TILE)
                rows = _rows(keys, order, place, stop, depth, k_l, D, TILE)
                centred = rows.to(tl.float32) - mean[None, :]
                centred = tl.where((place < stop)[:, None], centred, 0.0)
                if VAR:
                    spread += tl.sum(centred * centred, 0)
                if COV:
                    other = _rows(values, order, place, stop, depth, v_l, D, TILE)
                    cov = tl.dot(tl.trans(centred.to(rows.dtype)), other, cov, PRECISION)
            if VAR:
                tl.store(k_var + at * D + depth, spread * by)
            if COV:
                tl.store(cov_norm + at, tl.sqrt(tl.sum(cov * cov)))
                if j < num_video:
                    total += cov
    if COV:
        at_part = head.to(tl.int64) * tl.num_programs(0) + part
        square = depth[:, None] * D + depth[None, :]
        tl.store(cov_part + at_part * D * D + square, total)


def plainly(
    k: Tensor, v: Tensor, order: Compact, num_video: int, values: bool, var: bool, cov: bool
) -> dict[str, Tensor]:
    """What is wanted of every block, by name, and the sum of the video's covariances."""
    batch, heads, _, depth = k.shape
    blocks = order.offsets.shape[-1] - 1
    chosen = setting(f"block_summary.{'cov' if cov else 'mean'}", k, k.shape[2])
    parts = -(-blocks // chosen["RUN"])
    names = ("k_mean", *(("v_mean",) * values), *(("k_var",) * var))
    made = room_for(k, blocks, *names)
    mean = made["k_mean"]
    norm = part = mean
    if cov:
        norm = torch.empty((batch, heads, blocks), dtype=torch.float32, device=k.device)
        part = norm.new_empty((batch, heads, parts, depth, depth))
    launch(
        summary_kernel,
        (parts, batch * heads),
        (k, v, *order, mean, made.get("v_mean", mean), made.get("k_var", mean), norm, part),
        (heads, blocks, num_video, *strides_of(k, v, order)),
        **_plain_constants(chosen, depth, values, var, cov),
        PRECISION="ieee" if k.dtype == torch.float32 else "tf32",
    )
    return made | ({"cov_sum": part.sum(2), "cov_norm": norm} if cov else {})


def _plain_constants(
    chosen: Setting, depth: int, values: bool, var: bool, cov: bool
) -> dict[str, int]:
    return {"D": depth, **chosen.values, "VALUES": values, "VAR": var, "COV": cov}


def _specimens() -> Iterator[Specimen]:
    for depth in (64, 128):
        for switches in ((False, False, False), (True, False, False), (True, True, True)):
            chosen = SPACES[f"block_summary.{'cov' if switches[2] else 'mean'}"].half
            constants = _plain_constants(chosen, depth, *switches)
            yield specimen(
                summary_kernel,
                f"summary D{depth}{' values' * switches[0]}{' var cov' * switches[1]}",
                "bf16",
                {**constants, "PRECISION": "tf32"},
            )


SPECIMENS = list(_specimens()) if isinstance(summary_kernel, triton.JITFunction) else []
