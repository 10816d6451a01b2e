"""The block statistics as kernels, keys and values gathered as they are read.

Blocks that fit a tile, which a caller must know, are read once for their means. Their covariances,
in bf16, take another pass without any mean: with ``P`` what subtracts it,
``Σ_j (P K_j)ᵀ V_j = Σ_j K_jᵀ V_j - Σ_j n_j k̄_j v̄_jᵀ`` accumulates in the tensor cores over many
blocks, and ``‖(P K)ᵀ V‖² = Σ (K Kᵀ P) ∘ (P V Vᵀ)`` needs Gram matrices as small as a block. Blocks
of any length, and fp32, go the plain way: twice over every block, a covariance for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.backends import capability
from dit_accel.kernels.block_summary.api import BlockSummary
from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import Compact, compact, remembered
from dit_accel.kernels.specimen import Specimen, typed
from dit_accel.kernels.tuning import SPACES, Setting, setting

_TILE = 64
_RUN = 32
"""Blocks of a program that keeps covariances: each leaves a ``D × D`` sum of its own."""
_LONG_RUN = 64
"""The same, where a block takes little."""
_LONGEST = 128
"""Tokens of a block that is read at once."""
_LATE = (torch.bfloat16,)
"""Dtypes that lose nothing when means are subtracted from sums of products."""
_ROWS = 16
"""Rows of a covariance that a program finishes."""
_SIZES = ["heads", "blocks", "num_video", "perm_b", "perm_h", "offset_b", "offset_h"]


@triton.jit
def _rows(x, perm, place, stop, depth, stride, D: tl.constexpr, TILE: tl.constexpr):
    """Some tokens of a block, in fp32, zero beyond its end."""
    inside = place < stop
    token = tl.load(perm + place, mask=inside, other=0).to(tl.int64)
    where = x + token[:, None] * stride + depth[None, :]
    return tl.load(where, mask=inside[:, None], other=0.0)


@triton.jit(do_not_specialize=_SIZES)
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


@triton.jit(do_not_specialize=[n for n in _SIZES if n != "num_video"])
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


@triton.jit(do_not_specialize=[*_SIZES, "video_parts"])
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
        late = tile <= _TILE and k.dtype in _LATE and _capability(k.device) >= (9, 0)
        if late or not cov:
            made |= _means(k, v, order, tile, values=values, var=var)
            if cov:
                made |= _covariances(k, v, order, num_video, tile, made["k_mean"], made["v_mean"])
            return made, order.offsets
    return made | _plainly(k, v, order, num_video, values, var, cov), order.offsets


def _new(k: Tensor, blocks: int, *wanted: str) -> dict[str, Tensor]:
    """Means and variances that are wanted, empty."""
    shape = (*k.shape[:2], blocks, k.shape[3])
    return {name: torch.empty(shape, dtype=torch.float32, device=k.device) for name in wanted}


def _shared(k: Tensor, v: Tensor, order: Compact) -> tuple[int, ...]:
    """Strides that all kernels take."""
    return (
        *(*k.stride()[:3], *v.stride()[:3]),
        *(*lead_strides(order.perm), *lead_strides(order.offsets)),
    )


def _means(
    k: Tensor, v: Tensor, order: Compact, tile: int, *, values: bool, var: bool
) -> dict[str, Tensor]:
    batch, heads, _, depth = k.shape
    blocks = order.offsets.shape[-1] - 1
    names = ("k_mean", *(("v_mean",) * values), *(("k_var",) * var))
    made = _new(k, blocks, *names)
    mean = made["k_mean"]
    if blocks:
        launch(
            mean_kernel,
            (blocks, batch * heads),
            # what is not wanted is never written, but must be somewhere
            (k, v, *order, mean, made.get("v_mean", mean), made.get("k_var", mean)),
            (heads, blocks, *_shared(k, v, order)),
            **_mean_constants(depth, tile, values, var),
        )
    return made


def _mean_constants(depth: int, tile: int, values: bool, var: bool) -> dict[str, int]:
    warps = 1 if tile * depth < 8192 else 2
    if var and tile * depth > 8192:
        warps = 8  # a tile stays in registers
    return {"D": depth, "TILE": tile, "VALUES": values, "VAR": var, "num_warps": warps}


def _covariances(
    k: Tensor, v: Tensor, order: Compact, num_video: int, tile: int, k_mean: Tensor, v_mean: Tensor
) -> dict[str, Tensor]:
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
            (heads, blocks, num_video, video_parts, *_shared(k, v, order)),
            **_cov_constants(depth, tile, flat=_capability(k.device) >= (10, 0)),
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


def _capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; in the interpreter that of Hopper."""
    return capability(device) if device.type == "cuda" else (9, 0)


def _finish_constants(depth: int) -> dict[str, int]:
    return {"D": depth, "ROWS": min(depth, _ROWS), "STEP": 32, "num_warps": 4}


def _plainly(
    k: Tensor, v: Tensor, order: Compact, num_video: int, values: bool, var: bool, cov: bool
) -> dict[str, Tensor]:
    batch, heads, _, depth = k.shape
    blocks = order.offsets.shape[-1] - 1
    chosen = setting(f"block_summary.{'cov' if cov else 'mean'}", k, k.shape[2])
    parts = -(-blocks // chosen["RUN"])
    names = ("k_mean", *(("v_mean",) * values), *(("k_var",) * var))
    made = _new(k, blocks, *names)
    mean = made["k_mean"]
    norm = part = mean
    if cov:
        norm = torch.empty((batch, heads, blocks), dtype=torch.float32, device=k.device)
        part = norm.new_empty((batch, heads, parts, depth, depth))
    launch(
        summary_kernel,
        (parts, batch * heads),
        (k, v, *order, mean, made.get("v_mean", mean), made.get("k_var", mean), norm, part),
        (heads, blocks, num_video, *_shared(k, v, order)),
        **_plain_constants(chosen, depth, values, var, cov),
        PRECISION="ieee" if k.dtype == torch.float32 else "tf32",
    )
    return made | ({"cov_sum": part.sum(2), "cov_norm": norm} if cov else {})


def _plain_constants(
    chosen: Setting, depth: int, values: bool, var: bool, cov: bool
) -> dict[str, int]:
    return {"D": depth, **chosen.values, "VALUES": values, "VAR": var, "COV": cov}


def _specimen(kernel: Any, name: str, dtype: str, constants: dict[str, Any]) -> Specimen:
    options: dict[str, Any] = {}
    for option in ("num_warps", "num_stages"):
        if option in constants:
            options[option] = constants.pop(option)
    names = ("k_mean", "v_mean", "k_var", "cov_norm", "cov_part", "cov_sum")
    types = {
        **dict.fromkeys(("k", "v"), f"*{dtype}"),
        **dict.fromkeys(("perm", "offsets"), "*i32"),
        **dict.fromkeys(names, "*fp32"),
    }
    signature = typed(kernel, constants, **types)
    strides = tuple(n for n in ("k_b", "k_h", "k_l", "v_b", "v_h", "v_l") if n in signature)
    return Specimen(f"{name} {dtype}", kernel, signature, constants, options, aligned=strides)


def _specimens() -> Iterator[Specimen]:
    for depth in (64, 128):
        for tile in (64, 128):
            for switch in (False, True):
                yield _specimen(
                    mean_kernel,
                    f"means D{depth} tile {tile}{' values var' * switch}",
                    "bf16",
                    _mean_constants(depth, tile, switch, switch),
                )
        for tile in (16, 64):
            for flat, least, most in ((False, 90, 90), (True, 100, 100)):
                one = _specimen(
                    cov_kernel,
                    f"cov D{depth} tile {tile}",
                    "bf16",
                    _cov_constants(depth, tile, flat=flat),
                )
                yield replace(one, least=least, most=most)
        yield _specimen(finish_kernel, f"finish D{depth}", "bf16", _finish_constants(depth))
        for switches in ((False, False, False), (True, False, False), (True, True, True)):
            chosen = SPACES[f"block_summary.{'cov' if switches[2] else 'mean'}"].half
            constants = _plain_constants(chosen, depth, *switches)
            yield _specimen(
                summary_kernel,
                f"summary D{depth}{' values' * switches[0]}{' var cov' * switches[1]}",
                "bf16",
                {**constants, "PRECISION": "tf32"},
            )


SPECIMENS = list(_specimens()) if isinstance(summary_kernel, triton.JITFunction) else []
