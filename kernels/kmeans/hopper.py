"""The nearest centroids on Hopper, in Gluon: one group's comparisons behind the others' products.

One warp brings centroids by TMA, 64 at a time; three warp groups hold 64 tokens each in registers.
While one compares its distances, the products of the others go on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.kernels.gluon_names import before_hand_over, load_box
from dit_accel.kernels.kmeans.clusters import Clusters
from dit_accel.kernels.launch import launch
from dit_accel.kernels.specimen import Specimen

_ROWS = gl.constexpr(64)
"""Tokens of a warp group."""
_GROUPS = gl.constexpr(3)
_SIZES = ["heads", "length", "clusters", "step", "valid_b"]


@gluon.jit
def _bring(centres, bufs, ready, free, row, tiles):
    stages: gl.constexpr = bufs.shape[0]
    width: gl.constexpr = bufs.shape[1]
    depth: gl.constexpr = bufs.shape[2]
    for i in range(tiles):
        at = i % stages
        mbarrier.wait(free.index(at), ((i // stages) & 1) ^ 1)
        mbarrier.expect(ready.index(at), width * depth * 2)
        load_box(centres, [row + i * width, 0], ready.index(at), bufs.index(at))


@gluon.jit
def _nearest(
    x,
    valid,
    half,
    label,
    moved,
    x_l,
    first,
    length,
    clusters,
    step,
    bufs,
    ready,
    free,
    tiles,
    group: gl.constexpr,
    HAS_VALID: gl.constexpr,
):
    stages: gl.constexpr = bufs.shape[0]
    width: gl.constexpr = bufs.shape[1]
    depth: gl.constexpr = bufs.shape[2]
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // depth, depth // 8], [4, 1], [1, 0])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)

    token = first + group * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, flat))
    keep = token < length
    if HAS_VALID:
        keep = keep & (gl.load(valid + token, mask=keep, other=0) != 0)
    column = gl.arange(0, depth, gl.SliceLayout(0, flat))
    where = gl.expand_dims(token.to(gl.int64) * x_l, 1) + gl.expand_dims(column, 0)
    rows = gl.load(x + where, mask=gl.expand_dims(keep, 1), other=0.0)
    rows = gl.convert_layout(rows, operand)

    number = gl.arange(0, width, gl.SliceLayout(0, result))
    nothing = gl.zeros([_ROWS, width], gl.float32, result)
    best = gl.full([_ROWS, width], float("-inf"), gl.float32, result)
    best_tile = gl.full([_ROWS, width], 0, gl.int32, result)
    for i in range(tiles):
        less = gl.load(half + i * width + number)
        at = i % stages
        mbarrier.wait(ready.index(at), (i // stages) & 1)
        score = warpgroup_mma(rows, bufs.index(at).permute((1, 0)), nothing, use_acc=False)
        mbarrier.arrive(free.index(at), count=1)
        score = score - gl.expand_dims(less, 0)
        # the largest of each column of tiles; one reduction at the end
        better = score > best
        best = gl.where(better, score, best)
        best_tile = gl.where(better, i, best_tile)
    at_best = best == gl.expand_dims(gl.max(best, 1), 1)
    found = gl.where(at_best, best_tile * width + gl.expand_dims(number, 0), clusters)
    # among equals the first; at most the last, if all there is is NaN
    nearest = gl.minimum(gl.min(found, 1), clusters - 1)
    place = first + group * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, result))
    there = place < length
    if step > 0:
        before = gl.load(label + place, mask=there, other=0)
        differs = gl.max((there & (before != nearest)).to(gl.int32), 0)
        if differs > 0:
            gl.store(moved, 1)
    gl.store(label + place, nearest, mask=there)


@gluon.jit(do_not_specialize=_SIZES)
def assign_kernel(
    x,
    centres,
    half,
    label,
    valid,
    changed,
    x_b,
    x_h,
    x_l,
    valid_b,
    heads,
    length,
    clusters,
    step,
    D: gl.constexpr,
    HAS_VALID: gl.constexpr,
):
    pair = gl.program_id(1)
    moved = changed + step * gl.num_programs(1) + pair
    # nothing moved the last time, so nothing will
    live = gl.load(changed + gl.maximum(step - 1, 0) * gl.num_programs(1) + pair)
    if (step == 0) | (live != 0):
        b = (pair // heads).to(gl.int64)
        h = (pair % heads).to(gl.int64)
        width: gl.constexpr = 64
        stages: gl.constexpr = 4
        dtype: gl.constexpr = centres.dtype
        shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        bufs = gl.allocate_shared_memory(dtype, [stages, width, D], shared)
        signal: gl.constexpr = mbarrier.MBarrierLayout()
        ready = gl.allocate_shared_memory(gl.int64, [stages, 1], signal)
        free = gl.allocate_shared_memory(gl.int64, [stages, 1], signal)
        for stage in gl.static_range(stages):
            mbarrier.init(ready.index(stage), count=1)
            mbarrier.init(free.index(stage), count=_GROUPS)
        tiles = (clusters + width - 1) // width
        first = gl.program_id(0) * _ROWS * _GROUPS
        own = x + b * x_b + h * x_h
        here = valid + b * valid_b
        halves = half + pair * tiles * width
        labels = label + pair.to(gl.int64) * length
        stride = gl.to_tensor(x_l)
        before_hand_over()
        gl.warp_specialize(
            [
                (_nearest, (own, here, halves, labels, moved, stride, first, length, clusters,
                            step, bufs, ready, free, tiles, 0, HAS_VALID)),
                (_nearest, (own, here, halves, labels, moved, stride, first, length, clusters,
                            step, bufs, ready, free, tiles, 1, HAS_VALID)),
                (_nearest, (own, here, halves, labels, moved, stride, first, length, clusters,
                            step, bufs, ready, free, tiles, 2, HAS_VALID)),
                (_bring, (centres, bufs, ready, free, pair * clusters, tiles)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip


def assign(x: Tensor, state: Clusters, step: int) -> None:
    """Labels of the nearest centroids; of equal ones the first.

    Args:
        x: ``[B, H, L, D]`` in 16 bits, head size 64 or 128, with a last stride of 1.
        state: of which the centroids are read and the labels written.
        step: above 0, heads that did not change in the step before are left alone.
    """
    rows, depth = int(_ROWS.value * _GROUPS.value), x.shape[3]
    described = TensorDescriptor.from_tensor(state.centre.view(-1, depth), [64, depth], _layout())
    launch(
        assign_kernel,
        (-(-x.shape[2] // rows), x.shape[0] * x.shape[1]),
        (x, described, state.half, state.labels, state.mask, state.changed),
        state.arguments(x, step),
        D=depth,
        HAS_VALID=state.valid is not None,
        **LAUNCH,
    )


def _layout() -> Any:
    return gl.NVMMASharedLayout(128, 16, 2)


def _specimen(dtype: str, depth: int, valid: bool) -> Specimen:
    signature = {
        "x": f"*{dtype}",
        "centres": f"tensordesc<{dtype}[64, {depth}],{_layout()!r}>",
        "half": "*fp32",
        "label": "*i32",
        "valid": "*i1" if valid else "*i32",
        "changed": "*i32",
    }
    constants = {"D": depth, "HAS_VALID": valid}
    names = assign_kernel.arg_names
    signature |= {n: "i32" for n in names if n not in signature and n not in constants}
    name = f"assign {dtype} D{depth}{' valid' * valid}"
    strides = ("x_b", "x_h", "x_l")
    return Specimen(
        name, assign_kernel, signature, constants, LAUNCH, least=90, most=90, aligned=strides
    )


LAUNCH = {"num_warps": 4, "maxnreg": 128}
SPECIMENS = [
    _specimen("bf16", 128, False),
    _specimen("bf16", 128, True),
    _specimen("fp16", 64, False),
]
