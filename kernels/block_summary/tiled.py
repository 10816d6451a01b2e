"""The statistics of blocks that fit a tile: keys and values are read once, ahead of their use."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import Compact
from dit_accel.kernels.specimen import Specimen, typed

LONGEST = 128
"""Tokens of a block at most."""
_SIZES = ["heads", "blocks", "num_video", "run", "video_parts"]
_SIZES += ["perm_b", "perm_h", "offset_b", "offset_h"]


class Setting(NamedTuple):
    """How a kernel is launched: blocks of a program, warps, tiles in flight."""

    run: int
    warps: int
    stages: int


COV = Setting(32, 8, 3)
PLAIN = Setting(8, 4, 3)


@triton.jit
def _rows(x, token, known, depth, stride):
    where = x + token[:, None] * stride + depth[None, :]
    return tl.load(where, mask=known[:, None], other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def tile_kernel(
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
    run,
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
    VALUES: tl.constexpr,
    VAR: tl.constexpr,
    COV: tl.constexpr,
    GRAM: tl.constexpr,
    RAW: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A run of blocks, all of the video or all of the text."""
    part, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    first = part * run
    last = tl.minimum(first + run, num_video)
    if part >= video_parts:
        first = num_video + (part - video_parts) * run
        last = tl.minimum(first + run, blocks)
    depth = tl.arange(0, D)
    keys, values = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    order = perm + b * perm_b + h * perm_h
    bounds = offsets + b * offset_b + h * offset_h
    if COV:
        total = tl.zeros([D, D], tl.float32)
    lane = tl.arange(0, TILE)
    start, stop = tl.load(bounds + first), tl.load(bounds + tl.minimum(first + 1, blocks))
    if AHEAD:
        token = tl.load(order + start + lane, mask=start + lane < stop, other=0).to(tl.int64)
        rows = _rows(keys, token, lane < stop - start, depth, k_l)
        if VALUES:
            others = _rows(values, token, lane < stop - start, depth, v_l)
        next_start = tl.load(bounds + tl.minimum(first + 1, blocks))
        next_stop = tl.load(bounds + tl.minimum(first + 2, blocks))
        token = tl.load(order + next_start + lane, mask=next_start + lane < next_stop, other=0).to(
            tl.int64
        )
    for j in tl.range(first, last, num_stages=STAGES):
        inside = lane < stop - start
        if AHEAD:
            after_start = tl.load(bounds + tl.minimum(j + 2, blocks))
            after_stop = tl.load(bounds + tl.minimum(j + 3, blocks))
            known = lane < next_stop - next_start
            next_rows = _rows(keys, token, known, depth, k_l)
            if VALUES:
                next_others = _rows(values, token, known, depth, v_l)
            token = tl.load(
                order + after_start + lane, mask=after_start + lane < after_stop, other=0
            ).to(tl.int64)
        else:
            # what comes from two turns before cannot be read ahead
            next_start = tl.load(bounds + j + 1)
            next_stop = tl.load(bounds + tl.minimum(j + 2, blocks))
            token = tl.load(order + start + lane, mask=inside, other=0).to(tl.int64)
            rows = _rows(keys, token, inside, depth, k_l)
            if VALUES:
                others = _rows(values, token, inside, depth, v_l)
        count = tl.maximum(stop - start, 1).to(tl.float32)
        by = 1.0 / count
        wide = rows.to(tl.float32)
        mean = tl.sum(wide, 0) * by
        at = head.to(tl.int64) * blocks + j
        tl.store(k_mean + at * D + depth, mean)
        if VALUES:
            v_sum = tl.sum(others.to(tl.float32), 0)
            tl.store(v_mean + at * D + depth, v_sum * by)
        if VAR or COV:
            centred = tl.where(inside[:, None], wide - mean[None, :], 0.0)
            if VAR:
                tl.store(k_var + at * D + depth, tl.sum(centred * centred, 0) * by)
            if COV:
                if RAW:
                    cov = tl.dot(tl.trans(rows), others, input_precision=PRECISION)
                    cov -= mean[:, None] * v_sum[None, :]
                    total += cov
                    square = tl.sum(tl.sum(cov * cov, 1), 0)
                elif GRAM:
                    narrow = centred.to(rows.dtype)
                    total = tl.dot(tl.trans(narrow), others, total, PRECISION)
                    own = tl.dot(narrow, tl.trans(narrow), input_precision=PRECISION)
                    own *= tl.dot(others, tl.trans(others), input_precision=PRECISION)
                    square = tl.maximum(tl.sum(tl.sum(own, 1), 0), 0.0)
                else:
                    narrow = centred.to(rows.dtype)
                    cov = tl.dot(tl.trans(narrow), others, input_precision=PRECISION)
                    total += cov
                    square = tl.sum(tl.sum(cov * cov, 1), 0)
                tl.store(cov_norm + at, tl.sqrt(square))
        start = next_start
        stop = next_stop
        if AHEAD:
            next_start = after_start
            next_stop = after_stop
            rows = next_rows
            if VALUES:
                others = next_others
    if COV:
        if part < video_parts:
            at_part = head.to(tl.int64) * video_parts + part
            row = tl.arange(0, D)
            where = row[:, None] * D + depth[None, :]
            tl.store(cov_part + at_part * D * D + where, total)


def launch(
    k: Tensor,
    v: Tensor,
    order: Compact,
    num_video: int,
    longest: int,
    *,
    values: bool,
    var: bool,
    cov: bool,
    setting: Setting | None = None,
    how: tuple[bool, bool, bool] = (False, False, True),
) -> dict[str, Tensor]:
    """Statistics by name, ``cov_part`` for runs of blocks; what is not wanted is empty."""
    batch, heads, _, depth = k.shape
    blocks = order.offsets.shape[-1] - 1
    setting = setting or (COV if cov else PLAIN)
    # a run of both kinds would add the text's covariance to the video's
    split = num_video if cov else blocks
    video_parts = triton.cdiv(split, setting.run)
    parts = video_parts + triton.cdiv(blocks - split, setting.run)

    def new(wanted: bool, *shape: int) -> Tensor:
        # what is not wanted is never written, but must be somewhere
        size = (batch, heads, *shape) if wanted else (1,)
        return torch.empty(size, dtype=torch.float32, device=k.device)

    made = {
        "k_mean": new(True, blocks, depth),
        "v_mean": new(values, blocks, depth),
        "k_var": new(var, blocks, depth),
        "cov_norm": new(cov, blocks),
        "cov_part": new(cov, video_parts, depth, depth),
    }
    if not parts:
        return made
    tile_kernel[(parts, batch * heads)](
        k,
        v,
        *order,
        *made.values(),
        heads,
        blocks,
        split,
        setting.run,
        video_parts,
        *k.stride()[:3],
        *v.stride()[:3],
        *lead_strides(order.perm),
        *lead_strides(order.offsets),
        D=depth,
        TILE=max(16, triton.next_power_of_2(longest)),
        VALUES=values or cov,
        VAR=var,
        COV=cov,
        GRAM=how[0],
        RAW=how[1],
        AHEAD=how[2],
        STAGES=setting.stages,
        PRECISION="ieee" if k.dtype == torch.float32 else "tf32",
        num_warps=setting.warps,
    )
    return made


def specimen(
    dtype: str,
    depth: int,
    tile: int,
    values: bool,
    cov: bool,
    setting=None,
    how=(False, False, True),
) -> Specimen:
    """The kernel as it is launched."""
    setting = setting or (COV if cov else PLAIN)
    constants = {
        **{
            "D": depth,
            "TILE": tile,
            "VALUES": values,
            "VAR": cov,
            "COV": cov,
            "GRAM": how[0],
            "RAW": how[1],
            "AHEAD": how[2],
        },
        **{"STAGES": setting.stages, "PRECISION": "tf32"},
    }
    types = dict.fromkeys(("k", "v"), f"*{dtype}")
    types |= dict.fromkeys(("perm", "offsets"), "*i32")
    types |= dict.fromkeys(("k_mean", "v_mean", "k_var", "cov_norm", "cov_part"), "*fp32")
    name = f"summary {dtype} D{depth} tile {tile}{' values' * values}{' var cov' * cov} {setting} {how}"
    return Specimen(
        name,
        tile_kernel,
        typed(tile_kernel, constants, **types),
        constants,
        {"num_warps": setting.warps},
        aligned=("k_b", "k_h", "k_l", "v_b", "v_h", "v_l"),
    )


_COV_SIZES = [
    "heads",
    "blocks",
    "num_video",
    "video_parts",
    "perm_b",
    "perm_h",
    "offset_b",
    "offset_h",
]


@triton.jit(do_not_specialize=_COV_SIZES)
def cov_kernel(
    k,
    v,
    perm,
    offsets,
    k_mean,
    v_mean,
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
    TRANSPOSED: tl.constexpr,
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
        square = tl.maximum(tl.sum(tl.sum(own * other, 1), 0), 0.0)
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


def cov_launch(k, v, order, num_video, longest, k_mean, v_mean, setting):
    batch, heads, _, depth = k.shape
    blocks = order.offsets.shape[-1] - 1
    run = setting.run
    video_parts = triton.cdiv(num_video, run)
    parts = video_parts + triton.cdiv(blocks - num_video, run)
    new = lambda *s: torch.empty((batch, heads, *s), dtype=torch.float32, device=k.device)
    norm, part = new(blocks), new(video_parts, depth, depth)
    cov_kernel[(parts, batch * heads)](
        k,
        v,
        *order,
        k_mean,
        v_mean,
        norm,
        part,
        heads,
        blocks,
        num_video,
        video_parts,
        *k.stride()[:3],
        *v.stride()[:3],
        *lead_strides(order.perm),
        *lead_strides(order.offsets),
        D=depth,
        TILE=max(16, triton.next_power_of_2(longest)),
        RUN=run,
        STAGES=setting.stages,
        TRANSPOSED=False,
        num_warps=setting.warps,
    )
    return norm, part


def finish(part, order, num_video, k_mean, v_mean, rows=32, step=32, warps=4):
    batch, heads, blocks, depth = k_mean.shape
    out = torch.empty(batch, heads, depth, depth, dtype=torch.float32, device=part.device)
    finish_kernel[(depth // rows, batch * heads)](
        part,
        k_mean,
        v_mean,
        order.offsets,
        out,
        heads,
        blocks,
        num_video,
        part.shape[2],
        *lead_strides(order.offsets),
        D=depth,
        ROWS=rows,
        STEP=step,
        num_warps=warps,
    )
    return out


def finish_specimen(rows, step, warps):
    constants = {"D": 128, "ROWS": rows, "STEP": step}
    types = dict.fromkeys(("cov_part", "k_mean", "v_mean", "cov_sum"), "*fp32") | {
        "offsets": "*i32"
    }
    return Specimen(
        "finish",
        finish_kernel,
        typed(finish_kernel, constants, **types),
        constants,
        {"num_warps": warps},
    )


def cov_specimen(dtype, depth, tile, setting):
    constants = {
        "D": depth,
        "TILE": tile,
        "RUN": setting.run,
        "STAGES": setting.stages,
        "TRANSPOSED": False,
    }
    types = dict.fromkeys(("k", "v"), f"*{dtype}")
    types |= dict.fromkeys(("perm", "offsets"), "*i32")
    types |= dict.fromkeys(("k_mean", "v_mean", "cov_norm", "cov_part"), "*fp32")
    return Specimen(
        f"cov {setting}",
        cov_kernel,
        typed(cov_kernel, constants, **types),
        constants,
        {"num_warps": setting.warps},
        aligned=("k_b", "k_h", "k_l", "v_b", "v_h", "v_l"),
    )
