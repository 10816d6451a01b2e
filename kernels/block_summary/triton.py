"""The block statistics as a kernel: a run of blocks a program, keys gathered as they are read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_summary.api import BlockSummary
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import compact
from dit_accel.kernels.specimen import Specimen
from dit_accel.kernels.tuning import SPACES, setting

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
                tl.store(cov_norm + at, tl.sqrt(tl.sum(tl.sum(cov * cov, 1), 0)))
                if j < num_video:
                    total += cov
    if COV:
        at_part = head.to(tl.int64) * tl.num_programs(0) + part
        square = depth[:, None] * D + depth[None, :]
        tl.store(cov_part + at_part * D * D + square, total)


@torch.no_grad()
def block_mean(x: Tensor, perm: Tensor, offsets: Tensor, valid: Tensor | None) -> Tensor:
    mean, _ = _run(x, x, perm, offsets, 0, valid, values=False, var=False, cov=False)
    return mean["k_mean"]


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
) -> BlockSummary:
    made, bounds = _run(
        k, v, perm, offsets, num_video, key_valid, values=True, var=want_var, cov=want_cov
    )
    return BlockSummary(
        bounds.diff(dim=-1).long(),
        made["k_mean"],
        made["v_mean"],
        made["k_var"] if want_var else None,
        made["cov_part"].sum(2) if want_cov else None,
        made["cov_norm"] if want_cov else None,
    )


def _run(
    k: Tensor,
    v: Tensor,
    perm: Tensor,
    offsets: Tensor,
    num_video: int,
    valid: Tensor | None,
    *,
    values: bool,
    var: bool,
    cov: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    batch, heads, _, depth = k.shape
    blocks = offsets.shape[-1] - 1
    order = compact(perm, offsets, valid)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    chosen = setting(f"block_summary.{'cov' if cov else 'mean'}", k, k.shape[2])
    # each part leaves a D × D sum of its own, which torch adds up
    parts = triton.cdiv(blocks, chosen["RUN"])

    def new(wanted: bool, *shape: int) -> Tensor:
        # what is not wanted is never written, but must be somewhere
        size = (batch, heads, *shape) if wanted else (1,)
        return torch.empty(size, dtype=torch.float32, device=k.device)

    made = {
        "k_mean": new(True, blocks, depth),
        "v_mean": new(values, blocks, depth),
        "k_var": new(var, blocks, depth),
        "cov_norm": new(cov, blocks),
        "cov_part": new(cov, parts, depth, depth),
    }
    summary_kernel[(parts, batch * heads)](
        k,
        v,
        *order,
        *made.values(),
        heads,
        blocks,
        num_video,
        *k.stride()[:3],
        *v.stride()[:3],
        *lead_strides(order.perm),
        *lead_strides(order.offsets),
        D=depth,
        VALUES=values,
        VAR=var,
        COV=cov,
        PRECISION="ieee" if k.dtype == torch.float32 else "tf32",
        **chosen.values,
    )
    return made, order.offsets


def _specimen(dtype: str, depth: int, values: bool, cov: bool) -> Specimen:
    signature = {
        **dict.fromkeys(("k", "v"), f"*{dtype}"),
        **dict.fromkeys(("perm", "offsets"), "*i32"),
        **dict.fromkeys(("k_mean", "v_mean", "k_var", "cov_norm", "cov_part"), "*fp32"),
    }
    chosen = SPACES[f"block_summary.{'cov' if cov else 'mean'}"].half
    constants = {
        "D": depth,
        **chosen.constants,
        "VALUES": values,
        "VAR": cov,
        "COV": cov,
        "PRECISION": "tf32",
    }
    names = summary_kernel.arg_names
    signature |= {n: "i32" for n in names if n not in signature and n not in constants}
    name = f"summary {dtype} D{depth}{' values' * values}{' var cov' * cov}"
    return Specimen(name, summary_kernel, signature, constants, chosen.options)


SPECIMENS = (
    [
        _specimen("bf16", depth, values, cov)
        for depth in (64, 128)
        for values, cov in ((False, False), (True, False), (True, True))
    ]
    if isinstance(summary_kernel, triton.JITFunction)
    else []
)
