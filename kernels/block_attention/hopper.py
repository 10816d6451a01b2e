"""The exact tiles of block attention on Hopper, in Gluon: what Triton itself would not schedule.

One warp brings keys and values, two 64-row boxes a turn, wherever the list has them; two warp
groups take 64 queries each. A warp group starts the next logits before the product with the values
of the turn before, and computes its softmax while the latter runs (FlashAttention-3, arXiv
2407.08608); the two groups drift apart by themselves, and one's softmax hides behind the other's
products.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.kernels.block_attention.triton import LOG2E, Problem, lead
from dit_accel.kernels.packed import LENGTH_BITS
from dit_accel.kernels.specimen import Specimen

_BITS = gl.constexpr(LENGTH_BITS)
_MASK = gl.constexpr((1 << LENGTH_BITS) - 1)
BOX = 64
"""Keys in a box, the tile of a packed list."""
ROWS = 128
"""Queries of a program."""
_STAGES = gl.constexpr(2)
# renamed between Triton 3.6 and 3.9
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _bring(desc, first, second, row, buffer, ready):
    """Two boxes of rows into one buffer."""
    half: gl.constexpr = buffer.shape[0] // 2
    depth: gl.constexpr = buffer.shape[1]
    mbarrier.expect(ready, 2 * half * depth * 2)
    _load(desc, [row + (first >> _BITS), 0], ready, buffer.slice(0, half))
    _load(desc, [row + (second >> _BITS), 0], ready, buffer.slice(half, half))


@gluon.jit
def _producer(keys, values, entries, every, row, k_bufs, v_bufs, k_ready, k_free, v_ready, v_free):
    turns = (every + 1) // 2
    for i in range(turns):
        stage = i % _STAGES
        phase = (i // _STAGES) & 1
        first = gl.load(entries + 2 * i)
        second = gl.load(entries + 2 * i + 1)
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        _bring(keys, first, second, row, k_bufs.index(stage), k_ready.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        _bring(values, first, second, row, v_bufs.index(stage), v_ready.index(stage))


@gluon.jit
def _hide(s, entries, i, columns):
    """Mask what the two tiles of a turn do not hold."""
    half: gl.constexpr = s.shape[1] // 2
    first = gl.load(entries + 2 * i) & _MASK
    second = gl.load(entries + 2 * i + 1) & _MASK
    limit = gl.where(columns < half, first, second)
    known = (columns % half) < limit
    return gl.where(gl.expand_dims(known, 0), s, float("-inf"))


@gluon.jit
def _soften(s, m, mass, by):
    """Weights of logits, in powers of two; what the accumulator must be multiplied with."""
    peak = gl.maximum(m, gl.max(s, 1) * by)
    safe = gl.where(peak == float("-inf"), 0.0, peak)
    fade = gl.exp2(m - safe)
    p = gl.exp2(s * by - gl.expand_dims(safe, 1))
    return p, peak, mass * fade + gl.sum(p, 1), fade


@gluon.jit
def _consumer(
    group: gl.constexpr,
    q,
    tokens,
    count,
    q_l,
    init,
    init_lse,
    out,
    out_l,
    lse,
    entries,
    full,
    every,
    by,
    q_buf,
    k_bufs,
    v_bufs,
    k_ready,
    k_free,
    v_ready,
    v_free,
    INIT: gl.constexpr,
):
    depth: gl.constexpr = q_buf.shape[1]
    width: gl.constexpr = k_bufs.shape[1]
    dtype: gl.constexpr = q_buf.dtype
    rows: gl.constexpr = 64
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // depth, depth // 8], [4, 1], [1, 0])
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, depth, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    row_of: gl.constexpr = gl.SliceLayout(1, logits)
    acc_row: gl.constexpr = gl.SliceLayout(1, result)

    # the queries of this group, gathered
    place = group * rows + gl.arange(0, rows, gl.SliceLayout(1, flat))
    inside = place < count
    token = gl.load(tokens + place, mask=inside, other=0).to(gl.int64)
    column = gl.arange(0, depth, gl.SliceLayout(0, flat))
    where = gl.expand_dims(token, 1) * q_l + gl.expand_dims(column, 0)
    query = gl.load(q + where, mask=gl.expand_dims(inside, 1), other=0.0)
    q_buf.store(query)
    fence_async_shared()

    acc_place = group * rows + gl.arange(0, rows, acc_row)
    acc_inside = acc_place < count
    acc_token = gl.load(tokens + acc_place, mask=acc_inside, other=0).to(gl.int64)
    acc_column = gl.arange(0, depth, gl.SliceLayout(0, result))
    if INIT:
        start = gl.expand_dims(acc_token, 1) * depth + gl.expand_dims(acc_column, 0)
        acc = gl.load(init + start, mask=gl.expand_dims(acc_inside, 1), other=0.0).to(gl.float32)
        row_place = group * rows + gl.arange(0, rows, row_of)
        row_inside = row_place < count
        row_token = gl.load(tokens + row_place, mask=row_inside, other=0)
        m = gl.load(init_lse + row_token, mask=row_inside, other=float("-inf"))
        m = m * 1.4426950408889634
        mass = gl.where(m == float("-inf"), 0.0, 1.0)
    else:
        acc = gl.zeros([rows, depth], gl.float32, result)
        m = gl.full([rows], float("-inf"), gl.float32, row_of)
        mass = gl.zeros([rows], gl.float32, row_of)
    nothing = gl.zeros([rows, width], gl.float32, logits)
    columns = gl.arange(0, width, gl.SliceLayout(0, logits))

    turns = (every + 1) // 2
    if turns > 0:
        mbarrier.wait(k_ready.index(0), 0)
        s = warpgroup_mma(q_buf, k_bufs.index(0).permute((1, 0)), nothing, use_acc=False)
        mbarrier.arrive(k_free.index(0), count=1)
        s = _hide(s, entries, 0, columns)
        p, m, mass, fade = _soften(s, m, mass, by)
        acc = acc * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
        a = gl.convert_layout(p.to(dtype), weights)
        for i in range(1, turns):
            stage = i % _STAGES
            before = (i - 1) % _STAGES
            mbarrier.wait(k_ready.index(stage), (i // _STAGES) & 1)
            s_next = warpgroup_mma(
                q_buf, k_bufs.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            mbarrier.wait(v_ready.index(before), ((i - 1) // _STAGES) & 1)
            acc_next = warpgroup_mma(a, v_bufs.index(before), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s_next,))
            mbarrier.arrive(k_free.index(stage), count=1)
            if i >= full // 2:
                s = _hide(s, entries, i, columns)
            p, m, mass, fade = _soften(s, m, mass, by)
            acc, a = warpgroup_mma_wait(0, deps=(acc_next, a))
            mbarrier.arrive(v_free.index(before), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
            a = gl.convert_layout(p.to(dtype), weights)
        last = (turns - 1) % _STAGES
        mbarrier.wait(v_ready.index(last), ((turns - 1) // _STAGES) & 1)
        acc = warpgroup_mma(a, v_bufs.index(last), acc)

    total = gl.where(mass == 0.0, 1.0, mass)
    norm = gl.where(mass == 0.0, float("-inf"), (m + gl.log2(total)) * 0.6931471805599453)
    acc = acc / gl.expand_dims(gl.convert_layout(total, acc_row), 1)
    target = out + gl.expand_dims(acc_token, 1) * out_l + gl.expand_dims(acc_column, 0)
    gl.store(target, acc.to(out.dtype.element_ty), mask=gl.expand_dims(acc_inside, 1))
    norm = gl.convert_layout(norm, acc_row)
    gl.store(lse + acc_token, norm, mask=acc_inside)


_SIZES = ["heads", "length", "rows", "num_tiles", "num_rows"]
_SIZES += [f"{name}_{axis}" for name in ("perm", "tile") for axis in "bh"]


@gluon.jit(do_not_specialize=_SIZES)
def exact_kernel(
    q,
    keys,
    values,
    q_perm,
    q_block,
    q_span,
    listed,
    counts,
    init,
    init_lse,
    out,
    lse,
    heads,
    length,
    rows,
    num_tiles,
    num_rows,
    by,
    q_b,
    q_h,
    q_l,
    perm_b,
    perm_h,
    tile_b,
    tile_h,
    out_b,
    out_h,
    out_l,
    INIT: gl.constexpr,
    D: gl.constexpr,
):
    head = gl.program_id(1)
    b = (head // heads).to(gl.int64)
    h = (head % heads).to(gl.int64)
    tile = num_rows - 1 - gl.program_id(0)
    at = b * tile_b + h * tile_h + tile
    span = gl.load(q_span + at)
    if span != 0:
        row = head.to(gl.int64) * rows + gl.load(q_block + at)
        entries = listed + row * (num_tiles + 2)
        full = gl.load(counts + row * 2)
        every = gl.load(counts + row * 2 + 1)
        tokens = q_perm + b * perm_b + h * perm_h + (span >> _BITS)
        count = span & _MASK

        dtype: gl.constexpr = keys.dtype
        shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        q_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], shared)
        k_bufs = gl.allocate_shared_memory(dtype, [2, 128, D], shared)
        v_bufs = gl.allocate_shared_memory(dtype, [2, 128, D], shared)
        signal: gl.constexpr = mbarrier.MBarrierLayout()
        k_ready = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
        k_free = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
        v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
        v_free = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
        for stage in gl.static_range(2):
            mbarrier.init(k_ready.index(stage), count=1)
            mbarrier.init(v_ready.index(stage), count=1)
            mbarrier.init(k_free.index(stage), count=2)
            mbarrier.init(v_free.index(stage), count=2)
        query = q + b * q_b + h * q_h
        start = init + head.to(gl.int64) * length * D
        start_lse = init_lse + head.to(gl.int64) * length
        target = out + b * out_b + h * out_h
        norms = lse + head.to(gl.int64) * length
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        0,
                        query,
                        tokens,
                        count,
                        q_l,
                        start,
                        start_lse,
                        target,
                        out_l,
                        norms,
                        entries,
                        full,
                        every,
                        by,
                        q_bufs.index(0),
                        k_bufs,
                        v_bufs,
                        k_ready,
                        k_free,
                        v_ready,
                        v_free,
                        INIT,
                    ),
                ),
                (
                    _consumer,
                    (
                        1,
                        query,
                        tokens,
                        count,
                        q_l,
                        start,
                        start_lse,
                        target,
                        out_l,
                        norms,
                        entries,
                        full,
                        every,
                        by,
                        q_bufs.index(1),
                        k_bufs,
                        v_bufs,
                        k_ready,
                        k_free,
                        v_ready,
                        v_free,
                        INIT,
                    ),
                ),
                (
                    _producer,
                    (
                        keys,
                        values,
                        entries,
                        every,
                        head * length,
                        k_bufs,
                        v_bufs,
                        k_ready,
                        k_free,
                        v_ready,
                        v_free,
                    ),
                ),
            ],
            [4, 1],
            [240, 24],
        )


def exact(problem: Problem, *, init: bool) -> None:
    """The exact tiles of a problem; with ``init`` on top of what ``out`` and ``lse`` hold.

    Args:
        problem: in fp16 or bf16, head size 64 or 128, tiles of 128 queries and 64 keys.
        init: whether a partial stands in ``out`` and ``lse``, to be merged.
    """
    q, out = problem.q, problem.out
    depth = q.shape[3]
    keys, values = (
        TensorDescriptor.from_tensor(x.view(-1, depth), [BOX, depth], shared_layout())
        for x in (problem.keys, problem.values)
    )
    exact_kernel[problem.grid](
        q,
        keys,
        values,
        problem.queries.perm,
        *problem.q_tiles,
        problem.listed,
        problem.counts,
        out,
        problem.lse,
        out,
        problem.lse,
        q.shape[1],
        q.shape[2],
        problem.code.shape[2],
        problem.listed.shape[-1] - 2,
        problem.grid[0],
        problem.scale * LOG2E,
        *q.stride()[:3],
        *lead(problem.queries.perm),
        *lead(problem.q_tiles.span),
        *out.stride()[:3],
        INIT=init,
        D=depth,
        **LAUNCH,
    )


def shared_layout() -> Any:
    """How rows lie in shared memory."""
    return gl.NVMMASharedLayout(128, 16, 2)


def _specimen(dtype: str, depth: int, init: bool) -> Specimen:
    bits = f"tensordesc<{dtype}[{BOX}, {depth}],{shared_layout()!r}>"
    signature = {
        **dict.fromkeys(("q", "init", "out"), f"*{dtype}"),
        **dict.fromkeys(("q_perm", "q_block", "q_span", "listed", "counts"), "*i32"),
        **dict.fromkeys(("init_lse", "lse"), "*fp32"),
        **dict.fromkeys(("keys", "values"), bits),
        "by": "fp32",
    }
    constants = {"INIT": init, "D": depth}
    names = exact_kernel.arg_names
    signature |= {n: "i32" for n in names if n not in signature and n not in constants}
    name = f"exact {dtype} D{depth}{' init' if init else ''}"
    return Specimen(name, exact_kernel, signature, constants, LAUNCH, least=90)


LAUNCH = {"num_warps": 4, "maxnreg": 168}
SPECIMENS = [_specimen("bf16", depth, init) for depth in (64, 128) for init in (False, True)]
