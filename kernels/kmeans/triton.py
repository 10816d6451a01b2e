"""k-means in Triton: distances and their minimum in one kernel, means over the sorted labels.

The same labels and centroids on every run: sums go over the tokens of a cluster in their order, and
no two programs add to one number. The host reads nothing. A head whose labels did not change raises
no flag, and the programs of later iterations that find none for it end at once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.backends import HEAD_SIZES, is_hopper
from dit_accel.kernels.first_use import rehearsing
from dit_accel.kernels.kmeans.clusters import SPECIMENS as BEGIN_SPECIMENS
from dit_accel.kernels.kmeans.clusters import Clusters
from dit_accel.kernels.label_order import label_order
from dit_accel.kernels.launch import launch
from dit_accel.kernels.packed import compact
from dit_accel.kernels.specimen import Specimen, typed
from dit_accel.kernels.tuning import SPACES, setting


@triton.jit(do_not_specialize=["heads", "length", "clusters", "step"])
def _assign(
    x_ptr,
    centre_ptr,
    half_ptr,
    label_ptr,
    valid_ptr,
    changed_ptr,
    x_b,
    x_h,
    x_l,
    valid_b,
    heads,
    length,
    clusters,
    step,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    groups = tl.num_programs(1)
    if step > 0:  # noqa: SIM102
        # nothing moved the last time, so nothing will
        if tl.load(changed_ptr + (step - 1) * groups + pair) == 0:
            return
    b, h = pair // heads, pair % heads
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    there = token < length
    keep = there
    if HAS_VALID:
        keep = keep & (tl.load(valid_ptr + b * valid_b + token, mask=there, other=0) != 0)
    depth = tl.arange(0, D)
    x = tl.load(
        x_ptr + b * x_b + h * x_h + token.to(tl.int64)[:, None] * x_l + depth[None, :],
        mask=keep[:, None],
        other=0.0,
    )
    centre_ptr += pair * clusters * D
    half_ptr += pair * (tl.cdiv(clusters, 64) * 64)
    best = tl.full([BM, BN], float("-inf"), tl.float32)
    best_tile = tl.zeros([BM, BN], tl.int32)
    column = tl.arange(0, BN)
    for first in range(0, clusters, BN):
        inside = first + column < clusters
        centre = tl.load(
            centre_ptr + (first + column)[None, :] * D + depth[:, None],
            mask=inside[None, :],
            other=0.0,
        )
        half = tl.load(half_ptr + first + column, mask=inside, other=float("inf"))
        score = tl.dot(x, centre, input_precision="ieee") - half[None, :]
        # the largest of each column of tiles; one reduction at the end
        better = score > best
        best = tl.where(better, score, best)
        best_tile = tl.where(better, first, best_tile)
    label = best_tile + column[None, :]
    label = tl.where(best == tl.max(best, 1)[:, None], label, clusters)
    # among equals the first; at most the last, if all there is is NaN
    nearest = tl.minimum(tl.min(label, 1), clusters - 1)
    label_ptr += pair * length
    if step > 0:
        before = tl.load(label_ptr + token, mask=there, other=0)
        moved = tl.sum((there & (before != nearest)).to(tl.int32), 0)
        if moved > 0:
            tl.atomic_max(changed_ptr + step * groups + pair, 1)
    tl.store(label_ptr + token, nearest, mask=there)


@triton.jit(do_not_specialize=["heads", "length", "clusters", "step"])
def _update(
    x_ptr,
    order_ptr,
    bound_ptr,
    valid_ptr,
    changed_ptr,
    exact_ptr,
    centre_ptr,
    half_ptr,
    x_b,
    x_h,
    x_l,
    valid_b,
    heads,
    length,
    clusters,
    step,
    D: tl.constexpr,
    BN: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    cluster, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    groups = tl.num_programs(1)
    if step > 1:  # noqa: SIM102
        if tl.load(changed_ptr + (step - 1) * groups + pair) == 0:
            return
    b, h = pair // heads, pair % heads
    depth = tl.arange(0, D)
    where = pair * clusters + cluster
    # one bound more than clusters
    start = tl.load(bound_ptr + where + pair)
    stop = tl.load(bound_ptr + where + pair + 1)
    order_ptr += pair * length
    x_ptr += b * x_b + h * x_h
    total = tl.zeros([BN, D], tl.float32)
    count = tl.zeros([BN], tl.int32)
    for first in range(start, stop, BN):
        place = first + tl.arange(0, BN)
        keep = place < stop
        token = tl.load(order_ptr + place, mask=keep, other=0).to(tl.int64)
        if HAS_VALID:
            keep = keep & (tl.load(valid_ptr + b * valid_b + token, mask=keep, other=0) != 0)
        x = tl.load(x_ptr + token[:, None] * x_l + depth[None, :], mask=keep[:, None], other=0.0)
        total += x.to(tl.float32)
        count += keep.to(tl.int32)
    number = tl.sum(count, 0)
    if number > 0:
        mean = tl.sum(total, 0) / number.to(tl.float32)
        rounded = mean.to(centre_ptr.dtype.element_ty)
        tl.store(exact_ptr + where * D + depth, mean)
        tl.store(centre_ptr + where * D + depth, rounded)
        back = rounded.to(tl.float32)
        half_ptr += pair * (tl.cdiv(clusters, 64) * 64)
        tl.store(half_ptr + cluster, 0.5 * tl.sum(back * back, 0))


def kmeans(
    x: Tensor,
    clusters: int,
    iterations: int,
    start: Tensor | None,
    valid: Tensor | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    x = x if x.stride(3) == 1 else x.contiguous()
    if rehearsing():
        iterations = min(iterations, 1)  # of which all have the same kernels
    state = Clusters(x, clusters, iterations, start, valid, seed)
    _assign_all(x, state, 0)
    for step in range(1, iterations + 1):
        update_means(x, state, step)
        _assign_all(x, state, step)
    return state.labels, state.exact


def _assign_all(x: Tensor, state: Clusters, step: int) -> None:
    if x.dtype.itemsize == 2 and x.shape[3] in HEAD_SIZES and is_hopper(x.device):
        from dit_accel.kernels.kmeans import hopper

        hopper.assign(x, state, step)
        return
    chosen = setting("kmeans.assign", x, x.shape[2])
    launch(
        _assign,
        (triton.cdiv(x.shape[2], chosen["BM"]), x.shape[0] * x.shape[1]),
        (x, state.centre, state.half, state.labels, state.mask, state.changed),
        state.arguments(x, step),
        D=x.shape[3],
        HAS_VALID=state.valid is not None,
        **chosen.values,
    )


def update_means(x: Tensor, state: Clusters, step: int) -> None:
    """Centroids of the labels; a cluster without a member keeps what it has.

    Args:
        x: ``[B, H, L, D]``, with a last stride of 1.
        state: of which the labels are read and the centroids written.
        step: above 0; from 2 on, heads that did not change in the step before are left alone.
    """
    clusters = state.centre.shape[2]
    order = compact(*label_order(state.labels, clusters), None)
    launch(
        _update,
        (clusters, x.shape[0] * x.shape[1]),
        (x, *order, state.mask, state.changed, state.exact, state.centre, state.half),
        state.arguments(x, step),
        D=x.shape[3],
        HAS_VALID=state.valid is not None,
        **setting("kmeans.update", x, x.shape[2]).values,
    )


def _specimens(depth: int, dtype: str) -> list[Specimen]:
    types = {
        "x_ptr": f"*{dtype}",
        "centre_ptr": f"*{dtype}",
        "half_ptr": "*fp32",
        "exact_ptr": "*fp32",
        "label_ptr": "*i32",
        "changed_ptr": "*i32",
        "valid_ptr": "*i32",
        "order_ptr": "*i32",
        "bound_ptr": "*i32",
    }
    settings: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
        (
            kernel,
            {"D": depth, **SPACES[name].half.constants, "HAS_VALID": False},
            SPACES[name].half.options,
        )
        for kernel, name in ((_assign, "kmeans.assign"), (_update, "kmeans.update"))
    ]
    return [
        Specimen(
            f"{kernel.__name__} {dtype} D={depth}",
            kernel,
            typed(kernel, constants, **types),
            constants,
            options,
            aligned=("x_b", "x_h", "x_l"),
        )
        for kernel, constants, options in settings
    ]


SPECIMENS = [*BEGIN_SPECIMENS, *_specimens(64, "fp16"), *_specimens(128, "bf16")]
