"""The exact tiles of block attention on Hopper, in Gluon: what the groups of warps do.

One warp brings keys and values, two 64-row boxes a turn, wherever the list has them; two warp
groups take 64 queries each. A warp group starts the next logits before the product with the values
of the turn before, and computes its softmax while the latter runs (FlashAttention-3, arXiv
2407.08608); the two groups drift apart by themselves, and one's softmax hides behind the other's
products. Queries that fit one group are taken by both: each has every other turn, and in the end
the second hands its partial to the first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_accel.kernels.packed import LENGTH_BITS, START_BIT

_BITS = gl.constexpr(START_BIT)
_COUNT = gl.constexpr(LENGTH_BITS)
_MASK = gl.constexpr((1 << LENGTH_BITS) - 1)
# renamed between Triton 3.6 and 3.9
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def _rows_of(entries, turn, row, boxes: gl.constexpr):
    """Where the boxes of one turn of a list begin: all read at once, for keys and values."""
    found = (row + (gl.load(entries + turn * boxes) >> _BITS),)
    for i in gl.static_range(1, boxes):
        found = found + (row + (gl.load(entries + turn * boxes + i) >> _BITS),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@gluon.jit
def _bring(desc, wide, rows, full, buffer, ready, BOX: gl.constexpr):
    """The boxes of one turn of a list into one buffer; full ones of a run at once, 64 rows each.

    ``full``: how many of the boxes, the first ones, are full. These rise by a box at least.
    """
    width: gl.constexpr = buffer.shape[0]
    depth: gl.constexpr = buffer.shape[1]
    boxes: gl.constexpr = 64 // BOX
    mbarrier.expect(ready, width * depth * 2)
    for part in gl.static_range(width // 64):
        first = rows[part * boxes]
        if BOX == 64:
            _load(desc, [first, 0], ready, buffer.slice(part * 64, 64))
        elif (rows[part * boxes + boxes - 1] == first + 64 - BOX) & ((part + 1) * boxes <= full):
            _load(wide, [first, 0], ready, buffer.slice(part * 64, 64))
        else:
            for i in gl.static_range(boxes):
                row = rows[part * boxes + i]
                _load(desc, [row, 0], ready, buffer.slice(part * 64 + i * BOX, BOX))


@gluon.jit
def _bring_run(desc, row, buffer, ready):
    """Consecutive rows into one buffer, by boxes of 64."""
    width: gl.constexpr = buffer.shape[0]
    depth: gl.constexpr = buffer.shape[1]
    mbarrier.expect(ready, width * depth * 2)
    for i in gl.static_range(width // 64):
        _load(desc, [row + i * 64, 0], ready, buffer.slice(i * 64, 64))


@gluon.jit
def _bring_turns(p, keys, values, entries, turns, plain, k_turn, v_turn, BOX: gl.constexpr):
    """Some turns of a list, keys and values; the boxes of the first ``plain`` are full."""
    k_stages: gl.constexpr = p.k_bufs.shape[0]
    v_stages: gl.constexpr = p.v_bufs.shape[0]
    boxes: gl.constexpr = p.k_bufs.shape[1] // BOX
    for i in range(turns):
        rows = _rows_of(entries, i, p.row, boxes)
        full = (plain - i) * boxes
        at = k_turn % k_stages
        mbarrier.wait(p.k_free.index(at), ((k_turn // k_stages) & 1) ^ 1)
        _bring(keys, p.wide_keys, rows, full, p.k_bufs.index(at), p.k_ready.index(at), BOX)
        k_turn += 1
        at = v_turn % v_stages
        mbarrier.wait(p.v_free.index(at), ((v_turn // v_stages) & 1) ^ 1)
        _bring(values, p.wide_values, rows, full, p.v_bufs.index(at), p.v_ready.index(at), BOX)
        v_turn += 1
    return k_turn, v_turn


@gluon.jit
def producer(
    p,
    pooled,
    BOX: gl.constexpr,
    WEIGHT: gl.constexpr,
    FIRST_ORDER: gl.constexpr,
    POOLED: gl.constexpr,
):
    """Brings the rest's means turn by turn, then the listed keys and values, level by level."""
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
    at = p.entries
    k_turn, v_turn = _bring_turns(p, p.keys, p.values, at, p.turn_1, p.plain_0, k_turn, v_turn, BOX)
    if POOLED:
        box_1: gl.constexpr = pooled[0].block_shape[0]
        box_2: gl.constexpr = pooled[2].block_shape[0]
        box_3: gl.constexpr = pooled[4].block_shape[0]
        at += p.turn_1 * (width // BOX)
        turns = p.turn_2 - p.turn_1
        plain = p.plain_1 - p.turn_1
        k_turn, v_turn = _bring_turns(
            p, pooled[0], pooled[1], at, turns, plain, k_turn, v_turn, box_1
        )
        at += turns * (width // box_1)
        turns = p.turn_3 - p.turn_2
        plain = p.plain_2 - p.turn_2
        k_turn, v_turn = _bring_turns(
            p, pooled[2], pooled[3], at, turns, plain, k_turn, v_turn, box_2
        )
        at += turns * (width // box_2)
        turns = p.turns - p.turn_3
        plain = p.plain_3 - p.turn_3
        k_turn, v_turn = _bring_turns(
            p, pooled[4], pooled[5], at, turns, plain, k_turn, v_turn, box_3
        )
    if FIRST_ORDER:
        at = v_turn % v_stages
        mbarrier.wait(p.v_free.index(at), ((v_turn // v_stages) & 1) ^ 1)
        _bring_run(p.cov, p.cov_row, p.v_bufs.index(at).slice(0, depth), p.cov_ready)


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
    box_1: gl.constexpr = BOX // 2 if BOX >= 16 else 8
    box_2: gl.constexpr = BOX // 4 if BOX >= 32 else 8
    box_3: gl.constexpr = BOX // 8 if BOX >= 64 else 8
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
def consumer(
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
    # queries that one group can hold are held by both, and the turns go by parity
    if WEIGHT == 0:
        turn = p.alone * group
        step = p.alone + 1
        first_row = (1 - p.alone) * group * rows
    else:
        turn = gl.to_tensor(0)
        step = gl.to_tensor(1)
        first_row = gl.to_tensor(group * rows)

    # the queries of this group, gathered
    place = first_row + gl.arange(0, rows, gl.SliceLayout(1, flat))
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

    acc_place = first_row + gl.arange(0, rows, acc_row)
    # the second group's share is handed to the first
    acc_inside = (acc_place < p.count) & (turn == 0)
    acc_token = gl.load(p.tokens + acc_place, mask=acc_inside, other=0).to(gl.int64)
    acc_column = gl.arange(0, depth, gl.SliceLayout(0, result))
    if INIT:
        start = gl.expand_dims(acc_token, 1) * depth + gl.expand_dims(acc_column, 0)
        acc = gl.load(p.init + start, mask=gl.expand_dims(acc_inside, 1), other=0.0)
        acc = acc.to(gl.float32)
        row_place = first_row + gl.arange(0, rows, row_of)
        row_inside = (row_place < p.count) & (turn == 0)
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

    k_turn = turn
    for i in range(turn, p.rest_turns, step):
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
        k_turn += step
        acc = acc * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
        at = i % v_stages
        mbarrier.wait(p.v_ready.index(at), (i // v_stages) & 1)
        a = gl.convert_layout(weights.to(dtype), operand)
        acc = warpgroup_mma(a, p.v_bufs.index(at), acc)
        mbarrier.arrive(p.v_free.index(at), count=1)
    rest_m = m
    rest_mass = mass

    turns = p.turns
    begin = (turn + p.rest_turns) & (step - 1)
    if turns > begin:
        v_turn = p.rest_turns + begin
        at = k_turn % k_stages
        mbarrier.wait(p.k_ready.index(at), (k_turn // k_stages) & 1)
        s = warpgroup_mma(q_buf, p.k_bufs.index(at).permute((1, 0)), nothing, use_acc=False)
        mbarrier.arrive(p.k_free.index(at), count=1)
        if POOLED:
            s = _hide_level(s * p.by, p, begin, columns, BOX)
        else:
            s = _hide(s * p.by, p.entries, begin, columns, BOX)
        weights, m, mass, fade = _soften(s, m, mass)
        acc = acc * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
        a = gl.convert_layout(weights.to(dtype), operand)
        for i in range(begin + step, turns, step):
            k_turn += step
            at = k_turn % k_stages
            mbarrier.wait(p.k_ready.index(at), (k_turn // k_stages) & 1)
            keys = p.k_bufs.index(at).permute((1, 0))
            s_next = warpgroup_mma(q_buf, keys, nothing, use_acc=False, is_async=True)
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
            v_turn += step
            acc = acc * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
            a = gl.convert_layout(weights.to(dtype), operand)
        v_at = v_turn % v_stages
        mbarrier.wait(p.v_ready.index(v_at), (v_turn // v_stages) & 1)
        acc = warpgroup_mma(a, p.v_bufs.index(v_at), acc)
        mbarrier.arrive(p.v_free.index(v_at), count=1)
    if FIRST_ORDER:
        v_at = (p.rest_turns + turns) % v_stages
        mbarrier.wait(p.cov_ready, 0)
        none = gl.zeros([rows, depth], gl.float32, result)
        first = warpgroup_mma(q_buf, p.v_bufs.index(v_at).slice(0, depth), none, use_acc=False)
        fade = gl.where(rest_mass == 0.0, 0.0, rest_mass * gl.exp2(rest_m - m))
        acc += first * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
    if WEIGHT == 0:  # noqa: SIM102
        if step == 2:
            if group == 1:
                p.handed.store(acc)
                p.sums.index(0).store(m)
                p.sums.index(1).store(mass)
                _barrier()
                mbarrier.arrive(p.joined, count=1)
            else:
                mbarrier.wait(p.joined, 0)
                m_other = p.sums.index(0).load(row_of)
                peak = gl.maximum(m, m_other)
                safe = gl.where(peak == float("-inf"), 0.0, peak)
                fade = gl.exp2(m - safe)
                fade_other = gl.exp2(m_other - safe)
                m = peak
                mass = mass * fade + p.sums.index(1).load(row_of) * fade_other
                acc = acc * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
                acc += p.handed.load(result) * gl.expand_dims(
                    gl.convert_layout(fade_other, acc_row), 1
                )

    total = gl.where(mass == 0.0, 1.0, mass)
    norm = gl.where(mass == 0.0, float("-inf"), (m + gl.log2(total)) * 0.6931471805599453)
    acc = acc / gl.expand_dims(gl.convert_layout(total, acc_row), 1)
    target = p.out + gl.expand_dims(acc_token, 1) * p.out_l + gl.expand_dims(acc_column, 0)
    gl.store(target, acc.to(p.out.dtype.element_ty), mask=gl.expand_dims(acc_inside, 1))
    norm = gl.convert_layout(norm, acc_row)
    gl.store(p.lse + acc_token, norm, mask=acc_inside)
