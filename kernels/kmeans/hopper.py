"""The nearest centroids on Hopper, in Gluon: one group's comparisons behind the others' products.

One warp brings centroids by TMA, 64 at a time; three warp groups hold 64 tokens each in registers.
While one compares its distances, the products of the others go on. Programs stay, one to a
multiprocessor, and copy their next tokens while they go through the centroids for these.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.kernels.backends import multiprocessors
from dit_accel.kernels.gluon_names import barrier, before_hand_over, load_box
from dit_accel.kernels.kmeans.clusters import Clusters
from dit_accel.kernels.launch import launch
from dit_accel.kernels.specimen import Specimen

_ROWS = gl.constexpr(64)
"""Tokens of a warp group."""
_GROUPS = gl.constexpr(3)
_SIZES = ["heads", "length", "clusters", "step", "valid_b", "pairs"]
# renamed between Triton 3.6 and 3.9
copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _live(changed, pair, pairs, step):
    """Whether a head is not settled: nothing moved the last time, so nothing will."""
    return (step <= 1) | (gl.load(changed + gl.maximum(step - 1, 0) * pairs + pair) != 0)


@gluon.jit
def _bring(
    centres, changed, begin, end, every, parts, pairs, clusters, step, tiles, bufs, ready, free
):  # fmt: skip
    stages: gl.constexpr = bufs.shape[0]
    width: gl.constexpr = bufs.shape[1]
    depth: gl.constexpr = bufs.shape[2]
    number = gl.to_tensor(0)
    for item in range(begin, end, every):
        pair = item // parts
        if _live(changed, pair, pairs, step):
            for i in range(tiles):
                at = number % stages
                mbarrier.wait(free.index(at), ((number // stages) & 1) ^ 1)
                mbarrier.expect(ready.index(at), width * depth * 2)
                row = pair * clusters + i * width
                load_box(centres, [row, 0], ready.index(at), bufs.index(at))
                number += 1


@gluon.jit
def _fetch(
    x, valid, x_b, x_h, x_l, valid_b, heads, length, parts, item, buf,
    group: gl.constexpr, HAS_VALID: gl.constexpr,
):  # fmt: skip
    """Begin to copy the tokens of an item."""
    depth: gl.constexpr = buf.shape[1]
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // depth, depth // 8], [4, 1], [1, 0])
    pair = item // parts
    b = (pair // heads).to(gl.int64)
    h = (pair % heads).to(gl.int64)
    token = (item % parts * _GROUPS + group) * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, flat))
    keep = token < length
    if HAS_VALID:
        keep = keep & (gl.load(valid + b * valid_b + token, mask=keep, other=0) != 0)
    column = gl.arange(0, depth, gl.SliceLayout(0, flat))
    where = gl.expand_dims(token.to(gl.int64) * x_l, 1) + gl.expand_dims(column, 0)
    copy_rows(buf, x + b * x_b + h * x_h + where, gl.expand_dims(keep, 1))
    async_copy.commit_group()


@gluon.jit
def _nearest(
    x, valid, half, label, changed, x_b, x_h, x_l, valid_b, heads, length,
    begin, end, every, parts, pairs, clusters, step, tiles,
    row_bufs, bufs, ready, free,
    group: gl.constexpr, HAS_VALID: gl.constexpr,
):  # fmt: skip
    stages: gl.constexpr = bufs.shape[0]
    width: gl.constexpr = bufs.shape[1]
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    number = gl.arange(0, width, gl.SliceLayout(0, result))
    nothing = gl.zeros([_ROWS, width], gl.float32, result)
    buf = row_bufs.index(group)
    _fetch(
        x, valid, x_b, x_h, x_l, valid_b, heads, length, parts, begin, buf, group, HAS_VALID
    )  # fmt: skip
    live = _live(changed, begin // parts, pairs, step)
    taken = gl.to_tensor(0)
    for item in range(begin, end, every):
        pair = item // parts
        here = live
        async_copy.wait_group(0)
        barrier()
        rows = buf.load(operand)
        # all of this group have read them
        barrier()
        following = item + every
        if following < end:
            live = _live(changed, following // parts, pairs, step)
            _fetch(
                x, valid, x_b, x_h, x_l, valid_b, heads, length, parts, following, buf,
                group, HAS_VALID,
            )  # fmt: skip
        if here:
            halves = half + pair * tiles * width + number
            best = gl.full([_ROWS, width], float("-inf"), gl.float32, result)
            best_tile = gl.full([_ROWS, width], 0, gl.int32, result)
            for i in range(tiles):
                less = gl.expand_dims(-gl.load(halves + i * width), 0)
                score, _ = gl.broadcast(less, nothing)
                at = taken % stages
                mbarrier.wait(ready.index(at), (taken // stages) & 1)
                score = warpgroup_mma(rows, bufs.index(at).permute((1, 0)), score)
                mbarrier.arrive(free.index(at), count=1)
                # the largest of each column of tiles; one reduction at the end
                better = score > best
                best = gl.where(better, score, best)
                best_tile = gl.where(better, i, best_tile)
                taken += 1
            at_best = best == gl.expand_dims(gl.max(best, 1), 1)
            found = gl.where(at_best, best_tile * width + gl.expand_dims(number, 0), clusters)
            # among equals the first; at most the last, if all there is is NaN
            nearest = gl.minimum(gl.min(found, 1), clusters - 1)
            place = gl.arange(0, _ROWS, gl.SliceLayout(1, result))
            place += (item % parts * _GROUPS + group) * _ROWS
            there = place < length
            labels = label + pair.to(gl.int64) * length
            if step > 0:
                before = gl.load(labels + place, mask=there, other=0)
                differs = gl.max((there & (before != nearest)).to(gl.int32), 0)
                if differs > 0:
                    gl.store(changed + step * pairs + pair, 1)
            gl.store(labels + place, nearest, mask=there)
    async_copy.wait_group(0)


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
    pairs,
    D: gl.constexpr,
    HAS_VALID: gl.constexpr,
):
    width: gl.constexpr = 64
    stages: gl.constexpr = 4
    dtype: gl.constexpr = centres.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
    bufs = gl.allocate_shared_memory(dtype, [stages, width, D], shared)
    row_bufs = gl.allocate_shared_memory(dtype, [_GROUPS, _ROWS, D], plain)
    signal: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], signal)
    free = gl.allocate_shared_memory(gl.int64, [stages, 1], signal)
    for stage in gl.static_range(stages):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=_GROUPS)
    tiles = (clusters + width - 1) // width
    # tokens of one head follow each other, so that programs read its centroids together
    parts = (length + _ROWS * _GROUPS - 1) // (_ROWS * _GROUPS)
    begin, every = gl.program_id(0), gl.num_programs(0)
    end = pairs * parts
    b, h, row = gl.to_tensor(x_b), gl.to_tensor(x_h), gl.to_tensor(x_l)
    before_hand_over()
    gl.warp_specialize(
        [
            (_nearest, (x, valid, half, label, changed, b, h, row, valid_b, heads, length,
                        begin, end, every, parts, pairs, clusters, step, tiles,
                        row_bufs, bufs, ready, free, 0, HAS_VALID)),
            (_nearest, (x, valid, half, label, changed, b, h, row, valid_b, heads, length,
                        begin, end, every, parts, pairs, clusters, step, tiles,
                        row_bufs, bufs, ready, free, 1, HAS_VALID)),
            (_nearest, (x, valid, half, label, changed, b, h, row, valid_b, heads, length,
                        begin, end, every, parts, pairs, clusters, step, tiles,
                        row_bufs, bufs, ready, free, 2, HAS_VALID)),
            (_bring, (centres, changed, begin, end, every, parts, pairs, clusters, step, tiles,
                      bufs, ready, free)),
        ],
        [4, 4, 1],
        [160, 160, 32],
    )  # fmt: skip


def assign(x: Tensor, state: Clusters, step: int) -> None:
    """Labels of the nearest centroids; of equal ones the first.

    Args:
        x: ``[B, H, L, D]`` in 16 bits, head size 64 or 128, with a last stride of 1.
        state: of which the centroids are read and the labels written.
        step: above 0, heads that did not change in the step before are left alone.
    """
    batch, heads, length, depth = x.shape
    described = TensorDescriptor.from_tensor(state.centre.view(-1, depth), [64, depth], _layout())
    items = batch * heads * -(-length // int(_ROWS.value * _GROUPS.value))
    launch(
        assign_kernel,
        (min(multiprocessors(x.device), items),),
        (x, described, state.half, state.labels, state.mask, state.changed),
        (*state.arguments(x, step), batch * heads),
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
