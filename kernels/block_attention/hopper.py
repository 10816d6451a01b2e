"""The exact tiles of block attention on Hopper, in Gluon: what Triton itself would not schedule.

One warp brings keys and values, two 64-row boxes a turn, wherever the list has them; two warp
groups take 64 queries each. A warp group starts the next logits before the product with the values
of the turn before, and computes its softmax while the latter runs (FlashAttention-3, arXiv
2407.08608); the two groups drift apart by themselves, and one's softmax hides behind the other's
products.
"""

from typing import Any

from torch import Tensor
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
from triton.language.core import _aggregate as aggregate

from dit_accel.kernels.block_attention.api import RestTerms
from dit_accel.kernels.block_attention.levels import LEVELS, TURN, box_of
from dit_accel.kernels.block_attention.problem import Problem
from dit_accel.kernels.block_attention.triton import WEIGHTS, rest_tables
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import LENGTH_BITS, START_BIT
from dit_accel.kernels.specimen import Specimen

_BITS = gl.constexpr(START_BIT)
_COUNT = gl.constexpr(LENGTH_BITS)
_MASK = gl.constexpr((1 << LENGTH_BITS) - 1)
# renamed between Triton 3.6 and 3.9
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _rows_of(entries, turn, row, boxes: gl.constexpr):
    """Where the boxes of one turn of a list begin: all read at once, for keys and values."""
    found = (row + (gl.load(entries + turn * boxes) >> _BITS),)
    for i in gl.static_range(1, boxes):
        found = found + (row + (gl.load(entries + turn * boxes + i) >> _BITS),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@gluon.jit
def _bring(desc, rows, buffer, ready, BOX: gl.constexpr):
    """The boxes of one turn of a list into one buffer."""
    width: gl.constexpr = buffer.shape[0]
    depth: gl.constexpr = buffer.shape[1]
    mbarrier.expect(ready, width * depth * 2)
    for i in gl.static_range(width // BOX):
        _load(desc, [rows[i], 0], ready, buffer.slice(i * BOX, BOX))


@gluon.jit
def _bring_run(desc, row, buffer, ready):
    """Consecutive rows into one buffer, by boxes of 64."""
    width: gl.constexpr = buffer.shape[0]
    depth: gl.constexpr = buffer.shape[1]
    mbarrier.expect(ready, width * depth * 2)
    for i in gl.static_range(width // 64):
        _load(desc, [row + i * 64, 0], ready, buffer.slice(i * 64, 64))


@gluon.jit
def _bring_turns(p, keys, values, entries, turns, k_turn, v_turn):
    """Some turns of a list, keys and values."""
    k_stages: gl.constexpr = p.k_bufs.shape[0]
    v_stages: gl.constexpr = p.v_bufs.shape[0]
    box: gl.constexpr = keys.block_shape[0]
    boxes: gl.constexpr = p.k_bufs.shape[1] // box
    for i in range(turns):
        rows = _rows_of(entries, i, p.row, boxes)
        at = k_turn % k_stages
        mbarrier.wait(p.k_free.index(at), ((k_turn // k_stages) & 1) ^ 1)
        _bring(keys, rows, p.k_bufs.index(at), p.k_ready.index(at), box)
        k_turn += 1
        at = v_turn % v_stages
        mbarrier.wait(p.v_free.index(at), ((v_turn // v_stages) & 1) ^ 1)
        _bring(values, rows, p.v_bufs.index(at), p.v_ready.index(at), box)
        v_turn += 1
    return k_turn, v_turn


@gluon.jit
def _producer(p, pooled, WEIGHT: gl.constexpr, FIRST_ORDER: gl.constexpr, POOLED: gl.constexpr):
    k_stages: gl.constexpr = p.k_bufs.shape[0]
    v_stages: gl.constexpr = p.v_bufs.shape[0]
    width: gl.constexpr = p.k_bufs.shape[1]
    depth: gl.constexpr = p.k_bufs.shape[2]
    k_turn = gl.to_tensor(0)
    for i in range(p.rest_turns):
        row = p.rest_row + i * width
        at = k_turn % k_stages
        mbarrier.wait(p.k_free.index(at), ((k_turn // k_stages) & 1) ^ 1)
        _bring_run(p.rest_keys, row, p.k_bufs.index(at), p.k_ready.index(at))
        k_turn += 1
        if WEIGHT != 0:
            at = k_turn % k_stages
            mbarrier.wait(p.k_free.index(at), ((k_turn // k_stages) & 1) ^ 1)
            _bring_run(p.rest_var, row, p.k_bufs.index(at), p.k_ready.index(at))
            k_turn += 1
        at = i % v_stages
        mbarrier.wait(p.v_free.index(at), ((i // v_stages) & 1) ^ 1)
        _bring_run(p.rest_values, row, p.v_bufs.index(at), p.v_ready.index(at))
    v_turn = p.rest_turns
    if POOLED:
        at = p.entries
        k_turn, v_turn = _bring_turns(p, p.keys, p.values, at, p.turn_1, k_turn, v_turn)
        at += p.turn_1 * (width // p.keys.block_shape[0])
        more = p.turn_2 - p.turn_1
        k_turn, v_turn = _bring_turns(p, pooled[0], pooled[1], at, more, k_turn, v_turn)
        at += more * (width // pooled[0].block_shape[0])
        more = p.turn_3 - p.turn_2
        k_turn, v_turn = _bring_turns(p, pooled[2], pooled[3], at, more, k_turn, v_turn)
        at += more * (width // pooled[2].block_shape[0])
        more = p.turns - p.turn_3
        k_turn, v_turn = _bring_turns(p, pooled[4], pooled[5], at, more, k_turn, v_turn)
    else:
        k_turn, v_turn = _bring_turns(p, p.keys, p.values, p.entries, p.turns, k_turn, v_turn)
    if FIRST_ORDER:
        at = v_turn % v_stages
        mbarrier.wait(p.v_free.index(at), ((v_turn // v_stages) & 1) ^ 1)
        _bring_run(p.cov, p.cov_row, p.v_bufs.index(at).slice(0, depth), p.v_ready.index(at))


@gluon.jit
def _hide(s, entries, turn, columns, BOX: gl.constexpr):
    """Logits in powers of two: mask what the tiles of a turn do not hold, and weigh the pooled."""
    boxes: gl.constexpr = s.shape[1] // BOX
    entry = gl.load(entries + turn * boxes + columns // BOX)
    known = (columns % BOX) < (entry & _MASK)
    pooled = ((entry >> _COUNT) & 7) + 1
    bias = gl.where(known, gl.log2(pooled.to(gl.float32)), float("-inf"))
    return s + gl.expand_dims(bias, 0)


@gluon.jit
def _level_of(p, turn):
    """How often a turn's keys were halved: its level in powers of two."""
    level = (turn >= p.turn_1).to(gl.int32) + (turn >= p.turn_2).to(gl.int32)
    return level + (turn >= p.turn_3).to(gl.int32)


@gluon.jit
def _is_plain(p, turn):
    """Whether all of a turn's boxes are of full length, and all their means of as many keys."""
    plain = turn < p.plain_0
    plain = plain | ((turn >= p.turn_1) & (turn < p.plain_1))
    plain = plain | ((turn >= p.turn_2) & (turn < p.plain_2))
    return plain | ((turn >= p.turn_3) & (turn < p.plain_3))


@gluon.jit
def _hide_level(s, p, turn, columns, BOX: gl.constexpr):
    """As `_hide`, where every level has boxes of its own."""
    width: gl.constexpr = s.shape[1]
    box_1 = gl.maximum(gl.to_tensor(BOX // 2), 8)
    box_2 = gl.maximum(gl.to_tensor(BOX // 4), 8)
    box_3 = gl.maximum(gl.to_tensor(BOX // 8), 8)
    at = gl.minimum(turn, p.turn_1) * (width // BOX)
    at += gl.maximum(gl.minimum(turn, p.turn_2) - p.turn_1, 0) * (width // box_1)
    at += gl.maximum(gl.minimum(turn, p.turn_3) - p.turn_2, 0) * (width // box_2)
    at += gl.maximum(turn - p.turn_3, 0) * (width // box_3)
    box = gl.where(turn < p.turn_1, BOX, gl.where(turn < p.turn_2, box_1, box_2))
    box = gl.where(turn < p.turn_3, box, box_3)
    entry = gl.load(p.entries + at + columns // box)
    known = (columns % box) < (entry & _MASK)
    pooled = ((entry >> _COUNT) & 7) + 1
    bias = gl.where(known, gl.log2(pooled.to(gl.float32)), float("-inf"))
    return s + gl.expand_dims(bias, 0)


@gluon.jit
def _soften(s, m, mass):
    """Weights of logits in powers of two; what the accumulator must be multiplied with."""
    peak = gl.maximum(m, gl.max(s, 1))
    safe = gl.where(peak == float("-inf"), 0.0, peak)
    fade = gl.exp2(m - safe)
    weights = gl.exp2(s - gl.expand_dims(safe, 1))
    return weights, peak, mass * fade + gl.sum(weights, 1), fade


@gluon.jit
def _soften_plain(s, m, mass, by):
    """As `_soften`, for logits that still want the scale: it goes into the exponent's product."""
    peak = gl.maximum(m, gl.max(s, 1) * by)
    fade = gl.exp2(m - peak)
    weights = gl.exp2(s * by - gl.expand_dims(peak, 1))
    return weights, peak, mass * fade + gl.sum(weights, 1), fade


@gluon.jit
def _soften_level(s, m, mass, by, level):
    """As `_soften_plain`, for means of as many keys each."""
    more = level.to(gl.float32)
    peak = gl.maximum(m, gl.max(s, 1) * by + more)
    fade = gl.exp2(m - peak)
    weights = gl.exp2(s * by - gl.expand_dims(peak - more, 1))
    return weights, peak, mass * fade + gl.sum(weights, 1), fade


@gluon.jit
def _consumer(
    p,
    group: gl.constexpr,
    q_buf,
    square_buf,
    BOX: gl.constexpr,
    WEIGHT: gl.constexpr,
    FIRST_ORDER: gl.constexpr,
    INIT: gl.constexpr,
    POOLED: gl.constexpr,
):
    depth: gl.constexpr = q_buf.shape[1]
    k_stages: gl.constexpr = p.k_bufs.shape[0]
    v_stages: gl.constexpr = p.v_bufs.shape[0]
    width: gl.constexpr = p.k_bufs.shape[1]
    dtype: gl.constexpr = q_buf.dtype
    rows: gl.constexpr = 64
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // depth, depth // 8], [4, 1], [1, 0])
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, depth, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    row_of: gl.constexpr = gl.SliceLayout(1, logits)
    acc_row: gl.constexpr = gl.SliceLayout(1, result)

    # the queries of this group, gathered
    place = group * rows + gl.arange(0, rows, gl.SliceLayout(1, flat))
    inside = place < p.count
    token = gl.load(p.tokens + place, mask=inside, other=0).to(gl.int64)
    column = gl.arange(0, depth, gl.SliceLayout(0, flat))
    where = gl.expand_dims(token, 1) * p.q_l + gl.expand_dims(column, 0)
    query = gl.load(p.q + where, mask=gl.expand_dims(inside, 1), other=0.0)
    q_buf.store(query)
    if WEIGHT != 0:
        scaled = query.to(gl.float32) * p.scale
        square_buf.store((scaled * scaled).to(dtype))
    fence_async_shared()

    acc_place = group * rows + gl.arange(0, rows, acc_row)
    acc_inside = acc_place < p.count
    acc_token = gl.load(p.tokens + acc_place, mask=acc_inside, other=0).to(gl.int64)
    acc_column = gl.arange(0, depth, gl.SliceLayout(0, result))
    if INIT:
        start = gl.expand_dims(acc_token, 1) * depth + gl.expand_dims(acc_column, 0)
        acc = gl.load(p.init + start, mask=gl.expand_dims(acc_inside, 1), other=0.0)
        acc = acc.to(gl.float32)
        row_place = group * rows + gl.arange(0, rows, row_of)
        row_inside = row_place < p.count
        row_token = gl.load(p.tokens + row_place, mask=row_inside, other=0)
        m = gl.load(p.init_lse + row_token, mask=row_inside, other=float("-inf"))
        m = m * 1.4426950408889634
        mass = gl.where(m == float("-inf"), 0.0, 1.0)
    else:
        acc = gl.zeros([rows, depth], gl.float32, result)
        m = gl.full([rows], float("-inf"), gl.float32, row_of)
        mass = gl.zeros([rows], gl.float32, row_of)
    nothing = gl.zeros([rows, width], gl.float32, logits)
    columns = gl.arange(0, width, gl.SliceLayout(0, logits))

    k_turn = gl.to_tensor(0)
    for i in range(p.rest_turns):
        number = i * width + columns
        known = number < p.columns
        kind = gl.load(p.code + number, mask=known, other=0)
        bias = gl.load(p.rest_bias + number, mask=known, other=float("-inf"))
        bias = gl.where(kind == -1, bias, float("-inf"))
        at = k_turn % k_stages
        mbarrier.wait(p.k_ready.index(at), (k_turn // k_stages) & 1)
        keys = p.k_bufs.index(at).permute((1, 0))
        if WEIGHT == 0:
            s = warpgroup_mma(q_buf, keys, nothing, use_acc=False)
            mbarrier.arrive(p.k_free.index(at), count=1)
            s = s * p.by + gl.expand_dims(bias, 0)
            weights, m, mass, fade = _soften(s, m, mass)
        else:
            s_next = warpgroup_mma(q_buf, keys, nothing, use_acc=False, is_async=True)
            k_turn += 1
            var_at = k_turn % k_stages
            mbarrier.wait(p.k_ready.index(var_at), (k_turn // k_stages) & 1)
            spread = p.k_bufs.index(var_at).permute((1, 0))
            shift_next = warpgroup_mma(square_buf, spread, nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s_next,))
            mbarrier.arrive(p.k_free.index(at), count=1)
            s = s * p.by + gl.expand_dims(bias, 0)
            shift = warpgroup_mma_wait(0, deps=(shift_next,))
            mbarrier.arrive(p.k_free.index(var_at), count=1)
            if WEIGHT == 1:
                # a factor, not a part of the exponent: a logarithm less for every weight
                peak = gl.maximum(m, gl.max(s, 1))
                safe = gl.where(peak == float("-inf"), 0.0, peak)
                fade = gl.exp2(m - safe)
                weights = gl.exp2(s - gl.expand_dims(safe, 1)) * (1.0 + shift)
                m = peak
                mass = mass * fade + gl.sum(weights, 1)
            else:
                s += shift * 1.4426950408889634
                weights, m, mass, fade = _soften(s, m, mass)
        k_turn += 1
        acc = acc * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
        at = i % v_stages
        mbarrier.wait(p.v_ready.index(at), (i // v_stages) & 1)
        a = gl.convert_layout(weights.to(dtype), operand)
        acc = warpgroup_mma(a, p.v_bufs.index(at), acc)
        mbarrier.arrive(p.v_free.index(at), count=1)
    rest_m = m
    rest_mass = mass

    turns = p.turns
    if turns > 0:
        at = k_turn % k_stages
        mbarrier.wait(p.k_ready.index(at), (k_turn // k_stages) & 1)
        s = warpgroup_mma(q_buf, p.k_bufs.index(at).permute((1, 0)), nothing, use_acc=False)
        mbarrier.arrive(p.k_free.index(at), count=1)
        if POOLED:
            s = _hide_level(s * p.by, p, gl.to_tensor(0), columns, BOX)
        else:
            s = _hide(s * p.by, p.entries, gl.to_tensor(0), columns, BOX)
        weights, m, mass, fade = _soften(s, m, mass)
        acc = acc * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
        a = gl.convert_layout(weights.to(dtype), operand)
        for i in range(1, turns):
            k_turn += 1
            at = k_turn % k_stages
            mbarrier.wait(p.k_ready.index(at), (k_turn // k_stages) & 1)
            keys = p.k_bufs.index(at).permute((1, 0))
            s_next = warpgroup_mma(q_buf, keys, nothing, use_acc=False, is_async=True)
            v_turn = p.rest_turns + i - 1
            v_at = v_turn % v_stages
            mbarrier.wait(p.v_ready.index(v_at), (v_turn // v_stages) & 1)
            acc_next = warpgroup_mma(a, p.v_bufs.index(v_at), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s_next,))
            mbarrier.arrive(p.k_free.index(at), count=1)
            if POOLED:
                if _is_plain(p, i):
                    level = _level_of(p, i)
                    weights, m, mass, fade = _soften_level(s, m, mass, p.by, level)
                else:
                    s = _hide_level(s * p.by, p, i, columns, BOX)
                    weights, m, mass, fade = _soften(s, m, mass)
            elif i >= p.plain_0:
                s = _hide(s * p.by, p.entries, i, columns, BOX)
                weights, m, mass, fade = _soften(s, m, mass)
            else:
                weights, m, mass, fade = _soften_plain(s, m, mass, p.by)
            acc, a = warpgroup_mma_wait(0, deps=(acc_next, a))
            mbarrier.arrive(p.v_free.index(v_at), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
            a = gl.convert_layout(weights.to(dtype), operand)
        v_turn = p.rest_turns + turns - 1
        v_at = v_turn % v_stages
        mbarrier.wait(p.v_ready.index(v_at), (v_turn // v_stages) & 1)
        acc = warpgroup_mma(a, p.v_bufs.index(v_at), acc)
        mbarrier.arrive(p.v_free.index(v_at), count=1)
    if FIRST_ORDER:
        v_turn = p.rest_turns + turns
        v_at = v_turn % v_stages
        mbarrier.wait(p.v_ready.index(v_at), (v_turn // v_stages) & 1)
        none = gl.zeros([rows, depth], gl.float32, result)
        first = warpgroup_mma(q_buf, p.v_bufs.index(v_at).slice(0, depth), none, use_acc=False)
        fade = gl.where(rest_mass == 0.0, 0.0, rest_mass * gl.exp2(rest_m - m))
        acc += first * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)

    total = gl.where(mass == 0.0, 1.0, mass)
    norm = gl.where(mass == 0.0, float("-inf"), (m + gl.log2(total)) * 0.6931471805599453)
    acc = acc / gl.expand_dims(gl.convert_layout(total, acc_row), 1)
    target = p.out + gl.expand_dims(acc_token, 1) * p.out_l + gl.expand_dims(acc_column, 0)
    gl.store(target, acc.to(p.out.dtype.element_ty), mask=gl.expand_dims(acc_inside, 1))
    norm = gl.convert_layout(norm, acc_row)
    gl.store(p.lse + acc_token, norm, mask=acc_inside)


class _Parts:
    """What the three groups of warps share."""

    q: gl.tensor
    tokens: gl.tensor
    count: gl.tensor
    q_l: gl.tensor
    init: gl.tensor
    init_lse: gl.tensor
    out: gl.tensor
    out_l: gl.tensor
    lse: gl.tensor
    entries: gl.tensor
    turns: gl.tensor
    turn_1: gl.tensor
    turn_2: gl.tensor
    turn_3: gl.tensor
    plain_0: gl.tensor
    plain_1: gl.tensor
    plain_2: gl.tensor
    plain_3: gl.tensor
    by: gl.tensor
    scale: gl.tensor
    code: gl.tensor
    columns: gl.tensor
    rest_bias: gl.tensor
    rest_turns: gl.tensor
    row: gl.tensor
    rest_row: gl.tensor
    cov_row: gl.tensor
    keys: tma.tensor_descriptor
    values: tma.tensor_descriptor
    rest_keys: tma.tensor_descriptor
    rest_values: tma.tensor_descriptor
    rest_var: tma.tensor_descriptor
    cov: tma.tensor_descriptor
    k_bufs: gl.shared_memory_descriptor
    v_bufs: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_ready: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, *values):
        for name, value in zip(_FIELDS, values, strict=True):
            setattr(self, name, value)


_FIELDS = tuple(_Parts.__annotations__)
_Parts = aggregate(_Parts)  # type: ignore[misc]
_SIZES = ["heads", "length", "table", "rows", "columns", "num_tiles", "num_rows", "rest_turns"]
_SIZES += [f"{name}_{axis}" for name in ("perm", "tile", "code", "bias") for axis in "bh"]


@gluon.jit(do_not_specialize=_SIZES)
def attend_kernel(
    q,
    keys,
    values,
    keys_2,
    values_2,
    keys_4,
    values_4,
    keys_8,
    values_8,
    rest_keys,
    rest_values,
    rest_var,
    cov,
    q_perm,
    q_block,
    q_span,
    listed,
    counts,
    code,
    rest_bias,
    init,
    init_lse,
    out,
    lse,
    heads,
    length,
    table,
    rows,
    columns,
    num_tiles,
    num_rows,
    rest_turns,
    scale,
    q_b,
    q_h,
    q_l,
    perm_b,
    perm_h,
    tile_b,
    tile_h,
    code_b,
    code_h,
    bias_b,
    bias_h,
    out_b,
    out_h,
    out_l,
    BOX: gl.constexpr,
    PER: gl.constexpr,
    WEIGHT: gl.constexpr,
    FIRST_ORDER: gl.constexpr,
    INIT: gl.constexpr,
    POOLED: gl.constexpr,
    D: gl.constexpr,
):
    head = gl.program_id(1)
    b = (head // heads).to(gl.int64)
    h = (head % heads).to(gl.int64)
    # the tiles that were cut last are text, whose rows are long: they go first
    at = b * tile_b + h * tile_h + num_rows - 1 - gl.program_id(0)
    span = gl.load(q_span + at)
    if span != 0:
        block = gl.load(q_block + at) >> 4
        row = head.to(gl.int64) * rows + block
        dtype: gl.constexpr = keys.dtype
        shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        signal: gl.constexpr = mbarrier.MBarrierLayout()
        # with a weight, the variances take turns with the keys
        k_stages: gl.constexpr = 2 if WEIGHT == 0 else 3
        q_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], shared)
        k_bufs = gl.allocate_shared_memory(dtype, [k_stages, PER, D], shared)
        v_bufs = gl.allocate_shared_memory(dtype, [2, PER, D], shared)
        k_ready = gl.allocate_shared_memory(gl.int64, [k_stages, 1], signal)
        k_free = gl.allocate_shared_memory(gl.int64, [k_stages, 1], signal)
        v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
        v_free = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
        if WEIGHT != 0:
            square_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], shared)
        else:
            square_bufs = q_bufs
        for stage in gl.static_range(k_stages):
            mbarrier.init(k_ready.index(stage), count=1)
            mbarrier.init(k_free.index(stage), count=2)
        for stage in gl.static_range(2):
            mbarrier.init(v_ready.index(stage), count=1)
            mbarrier.init(v_free.index(stage), count=2)
        # where each level's turns begin, and where they stop being plain
        boxes: gl.constexpr = PER // BOX
        if POOLED:
            own = counts + row * 8
            plain_0 = gl.load(own) // boxes
            turn_1 = (gl.load(own + 1) + boxes - 1) // boxes
            boxes_1: gl.constexpr = PER // keys_2.block_shape[0]
            plain_1 = turn_1 + gl.load(own + 2) // boxes_1
            turn_2 = turn_1 + (gl.load(own + 3) + boxes_1 - 1) // boxes_1
            boxes_2: gl.constexpr = PER // keys_4.block_shape[0]
            plain_2 = turn_2 + gl.load(own + 4) // boxes_2
            turn_3 = turn_2 + (gl.load(own + 5) + boxes_2 - 1) // boxes_2
            boxes_3: gl.constexpr = PER // keys_8.block_shape[0]
            plain_3 = turn_3 + gl.load(own + 6) // boxes_3
            turns = turn_3 + (gl.load(own + 7) + boxes_3 - 1) // boxes_3
        else:
            plain_0 = gl.load(counts + row * 2) // boxes
            turns = (gl.load(counts + row * 2 + 1) + boxes - 1) // boxes
            turn_1 = turns
            turn_2 = turns
            turn_3 = turns
            plain_1 = turns
            plain_2 = turns
            plain_3 = turns
        parts = _Parts(
            q + b * q_b + h * q_h,
            q_perm + b * perm_b + h * perm_h + (span >> _BITS),
            span & _MASK,
            gl.to_tensor(q_l),
            init + head.to(gl.int64) * length * D,
            init_lse + head.to(gl.int64) * length,
            out + b * out_b + h * out_h,
            gl.to_tensor(out_l),
            lse + head.to(gl.int64) * length,
            listed + row * num_tiles,
            turns,
            turn_1,
            turn_2,
            turn_3,
            plain_0,
            plain_1,
            plain_2,
            plain_3,
            scale * 1.4426950408889634,
            scale,
            code + b * code_b + h * code_h + block.to(gl.int64) * columns,
            columns,
            rest_bias + b * bias_b + h * bias_h,
            rest_turns,
            head * table,
            head * columns,
            head * D,
            keys,
            values,
            rest_keys,
            rest_values,
            rest_var,
            cov,
            k_bufs,
            v_bufs,
            k_ready,
            k_free,
            v_ready,
            v_free,
        )
        pooled = (keys_2, values_2, keys_4, values_4, keys_8, values_8)
        # in place, since a tuple that is given a name forgets which of its parts are constant
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        parts,
                        0,
                        q_bufs.index(0),
                        square_bufs.index(0),
                        BOX,
                        WEIGHT,
                        FIRST_ORDER,
                        INIT,
                        POOLED,
                    ),
                ),
                (
                    _consumer,
                    (
                        parts,
                        1,
                        q_bufs.index(1),
                        square_bufs.index(1),
                        BOX,
                        WEIGHT,
                        FIRST_ORDER,
                        INIT,
                        POOLED,
                    ),
                ),
                (_producer, (parts, pooled, WEIGHT, FIRST_ORDER, POOLED)),
            ],
            [4, 1],
            [232 if POOLED else 240, 40 if POOLED else 24],
        )


def attend(
    problem: Problem,
    rest: RestTerms | None,
    box: int,
    onto: tuple[Tensor, Tensor] | None = None,
    levels: bool = False,
) -> None:
    """A whole problem, on top of a partial if there is one.

    Args:
        problem: in fp16 or bf16, head size 64 or 128, tiles of 128 queries and ``box`` keys.
        rest: what stands in for the blocks of code -1.
        box: tokens of a key tile: 64, 32, 16 or 8.
        onto: attention over other keys, ``out`` ``[B, H, L, D]`` and ``lse`` ``[B, H, L]``.
        levels: the lists are of `levels.packed_levels`.
    """
    q, out = problem.q, problem.out
    init, init_lse = (x.contiguous() for x in onto or (out, problem.lse))
    heads, length, depth = q.shape[1:]
    columns = problem.code.shape[3]
    terms = rest_tables(rest, q, problem.scale)
    # a rest that is not there has no turns, and its descriptors stand for nothing
    tables = [terms[name] if rest is not None else problem.keys for name in ("k", "v")]
    weight = 0 if rest is None else WEIGHTS[rest.weight]
    first_order = rest is not None and rest.cov_sum is not None
    tables.append(terms["var"] if weight else tables[0])
    tables.append(terms["cov"] if first_order else tables[0])
    pooled = tuple(
        _described(x, box_of(level, box) if levels else box)
        for level in LEVELS[1:]
        for x in (problem.keys, problem.values)
    )
    attend_kernel[problem.grid](
        q,
        *(_described(x, box) for x in (problem.keys, problem.values)),
        *pooled,
        *(_described(x, 64) for x in tables),
        problem.queries.perm,
        *problem.q_tiles,
        problem.listed,
        problem.counts,
        problem.code,
        terms["bias"],
        init,
        init_lse,
        out,
        problem.lse,
        heads,
        length,
        problem.keys.shape[2],
        problem.code.shape[2],
        columns,
        problem.listed.shape[-1],
        problem.grid[0],
        0 if rest is None else -(-columns // TURN),
        problem.scale,
        *q.stride()[:3],
        *lead_strides(problem.queries.perm),
        *lead_strides(problem.q_tiles.span),
        *lead_strides(problem.code),
        *lead_strides(terms["bias"]),
        *out.stride()[:3],
        BOX=box,
        PER=TURN,
        WEIGHT=weight,
        FIRST_ORDER=first_order,
        INIT=onto is not None,
        POOLED=levels,
        D=depth,
        **LAUNCH,
    )


def _described(x: Tensor, box: int) -> Any:
    rows = x.view(-1, x.shape[-1])
    return TensorDescriptor.from_tensor(rows, [box, x.shape[-1]], shared_layout())


def shared_layout() -> Any:
    """How rows lie in shared memory."""
    return gl.NVMMASharedLayout(128, 16, 2)


def _specimen(
    dtype: str, depth: int, box: int, weight: int, first_order: bool, pooled: bool = False
) -> Specimen:
    sizes = [box_of(level, box) if pooled else box for level in LEVELS]
    bits = {
        size: f"tensordesc<{dtype}[{size}, {depth}],{shared_layout()!r}>" for size in (*sizes, 64)
    }
    signature = {
        **dict.fromkeys(("q", "init", "out"), f"*{dtype}"),
        **dict.fromkeys(("q_perm", "q_block", "q_span", "listed", "counts"), "*i32"),
        **dict.fromkeys(("init_lse", "lse", "rest_bias"), "*fp32"),
        **dict.fromkeys(("keys", "values"), bits[box]),
        **{f"{name}_{level}": bits[size] for name in ("keys", "values")
           for level, size in zip(LEVELS[1:], sizes[1:], strict=True)},
        **dict.fromkeys(("rest_keys", "rest_values", "rest_var", "cov"), bits[64]),
        "code": "*i8",
        "scale": "fp32",
    }
    constants = {
        "BOX": box,
        "PER": TURN,
        "WEIGHT": weight,
        "FIRST_ORDER": first_order,
        "INIT": False,
        "POOLED": pooled,
        "D": depth,
    }
    names = attend_kernel.arg_names
    signature |= {n: "i32" for n in names if n not in signature and n not in constants}
    name = f"attend {dtype} D{depth} box {box} weight {weight}{' first order' * first_order}"
    name += " levels" * pooled
    return Specimen(name, attend_kernel, signature, constants, LAUNCH, least=90, most=90)


LAUNCH = {"num_warps": 4, "maxnreg": 168}
SPECIMENS = [
    _specimen("bf16", 128, 64, 0, True),
    _specimen("bf16", 128, 64, 1, True),
    _specimen("bf16", 128, 16, 0, False),
    _specimen("fp16", 128, 64, 2, True),
    _specimen("bf16", 64, 64, 1, True),
    _specimen("bf16", 64, 8, 0, False),
    _specimen("bf16", 128, 64, 0, False, pooled=True),
    _specimen("fp16", 64, 16, 0, False, pooled=True),
]
