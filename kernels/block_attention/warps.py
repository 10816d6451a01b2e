"""The exact tiles of block attention on Hopper, in Gluon: what the groups of warps do.

As many programs run as there are multiprocessors, and each takes tiles of queries until none is
left. One warp takes the tiles, tells the others of each, and brings keys and values, two 64-row
boxes a turn, wherever the list has them: those of the next tile too, while the tile before is
finished. Two warp groups take 64 queries each. A warp group starts the next logits before the
product with the values of the turn before, and computes its softmax while the latter runs
(FlashAttention-3, arXiv 2407.08608); the two groups drift apart by themselves, and one's softmax,
and where a tile begins and ends, hides behind the other's products. Queries that fit one group are
taken by both: each has every other turn, and in the end the second hands its partial to the first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_accel.kernels.block_attention.softmax import (
    _hide,
    _hide_level,
    _is_plain,
    _level_of,
    _soften,
    _soften_level,
    _soften_plain,
)
from dit_accel.kernels.block_attention.tile import hear, heard
from dit_accel.kernels.gluon_names import barrier
from dit_accel.kernels.packed import LENGTH_BITS, START_BIT

_BITS = gl.constexpr(START_BIT)
_MASK = gl.constexpr((1 << LENGTH_BITS) - 1)


@gluon.jit
def _rows_of(entries, turn, row, boxes: gl.constexpr):
    """Where the boxes of one turn of a list begin: all read at once, for keys and values."""
    found = (row + (gl.load(entries + turn * boxes) >> _BITS),)
    for i in gl.static_range(1, boxes):
        found = found + (row + (gl.load(entries + turn * boxes + i) >> _BITS),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@gluon.jit
def _release(bar, alone):
    """A buffer is free when both groups say so; a group that has it to itself says it twice."""
    mbarrier.arrive(bar, count=1)
    mbarrier.arrive(bar, count=1, pred=alone == 1)


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
    k_first = gl.to_tensor(0)
    v_first = gl.to_tensor(0)
    number = gl.to_tensor(0)
    joins = gl.to_tensor(0)
    mbarrier.wait(p.told_ready.index(0), 0)
    span = heard(p, number, 0)
    while span != 0:
        tile = hear(p, number, span, POOLED)
        alone = ((span & _MASK) <= 64).to(gl.int32) if WEIGHT == 0 else gl.to_tensor(0)
        _attend(
            p, tile, alone, group, q_buf, square_buf, k_first, v_first, joins,
            BOX, WEIGHT, FIRST_ORDER, INIT, POOLED,
        )  # fmt: skip
        k_first += p.rest_turns * (1 if WEIGHT == 0 else 2) + tile.turns
        v_first += p.rest_turns + tile.turns + (1 if FIRST_ORDER else 0)
        joins += alone
        number += 1
        # all of this group are done with the queries
        barrier()
        mbarrier.wait(p.told_ready.index(number & 1), (number >> 1) & 1)
        span = heard(p, number, 0)


@gluon.jit
def _attend(
    p,
    tile,
    alone,
    group: gl.constexpr,
    q_buf,
    square_buf,
    k_first,
    v_first,
    joins,
    BOX: gl.constexpr,
    WEIGHT: gl.constexpr,
    FIRST_ORDER: gl.constexpr,
    INIT: gl.constexpr,
    POOLED: gl.constexpr,
):
    """One tile, by one group, from its queries to its results."""
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
        turn = alone * group
        step = alone + 1
        first_row = (1 - alone) * group * rows
    else:
        turn = gl.to_tensor(0)
        step = gl.to_tensor(1)
        first_row = gl.to_tensor(group * rows)

    b = (tile.head // p.heads).to(gl.int64)
    h = (tile.head % p.heads).to(gl.int64)
    one = tile.head.to(gl.int64)
    count = tile.span & _MASK
    tokens = p.q_perm + b * p.perm_b + h * p.perm_h + (tile.span >> _BITS)

    # the queries of this group, gathered
    place = first_row + gl.arange(0, rows, gl.SliceLayout(1, flat))
    inside = place < count
    token = gl.load(tokens + place, mask=inside, other=0).to(gl.int64)
    column = gl.arange(0, depth, gl.SliceLayout(0, flat))
    where = gl.expand_dims(token, 1) * p.q_l + gl.expand_dims(column, 0)
    query = gl.load(p.q + b * p.q_b + h * p.q_h + where, mask=gl.expand_dims(inside, 1), other=0.0)
    q_buf.store(query)
    if WEIGHT != 0:
        scaled = query.to(gl.float32) * p.scale
        square_buf.store((scaled * scaled).to(dtype))
    fence_async_shared()
    barrier()

    acc_place = first_row + gl.arange(0, rows, acc_row)
    # the second group's share is handed to the first
    acc_inside = (acc_place < count) & (turn == 0)
    acc_token = gl.load(tokens + acc_place, mask=acc_inside, other=0).to(gl.int64)
    acc_column = gl.arange(0, depth, gl.SliceLayout(0, result))
    if INIT:
        start = gl.expand_dims(acc_token, 1) * depth + gl.expand_dims(acc_column, 0)
        acc = gl.load(
            p.init + one * p.length * depth + start, mask=gl.expand_dims(acc_inside, 1), other=0.0
        )
        acc = acc.to(gl.float32)
        row_place = first_row + gl.arange(0, rows, row_of)
        row_inside = (row_place < count) & (turn == 0)
        row_token = gl.load(tokens + row_place, mask=row_inside, other=0)
        m = gl.load(p.init_lse + one * p.length + row_token, mask=row_inside, other=float("-inf"))
        m = m * 1.4426950408889634
        mass = gl.where(m == float("-inf"), 0.0, 1.0)
    else:
        acc = gl.zeros([rows, depth], gl.float32, result)
        m = gl.full([rows], float("-inf"), gl.float32, row_of)
        mass = gl.zeros([rows], gl.float32, row_of)
    nothing = gl.zeros([rows, width], gl.float32, logits)
    columns = gl.arange(0, width, gl.SliceLayout(0, logits))

    codes = p.code + b * p.code_b + h * p.code_h + tile.block.to(gl.int64) * p.columns
    biases = p.rest_bias + b * p.bias_b + h * p.bias_h
    k_turn = k_first + turn
    v_turn = v_first + turn
    for i in range(turn, p.rest_turns, step):
        number = i * width + columns
        known = number < p.columns
        kind = gl.load(codes + number, mask=known, other=0)
        bias = gl.load(biases + number, mask=known, other=float("-inf"))
        bias = gl.where(kind == -1, bias, float("-inf"))
        at = k_turn % k_stages
        mbarrier.wait(p.k_ready.index(at), (k_turn // k_stages) & 1)
        keys = p.k_bufs.index(at).permute((1, 0))
        if WEIGHT == 0:
            s = warpgroup_mma(q_buf, keys, nothing, use_acc=False)
            _release(p.k_free.index(at), alone)
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
        at = v_turn % v_stages
        mbarrier.wait(p.v_ready.index(at), (v_turn // v_stages) & 1)
        a = gl.convert_layout(weights.to(dtype), operand)
        acc = warpgroup_mma(a, p.v_bufs.index(at), acc)
        _release(p.v_free.index(at), alone)
        v_turn += step
    rest_m = m
    rest_mass = mass

    turns = tile.turns
    begin = (turn + p.rest_turns) & (step - 1)
    if turns > begin:
        at = k_turn % k_stages
        mbarrier.wait(p.k_ready.index(at), (k_turn // k_stages) & 1)
        s = warpgroup_mma(q_buf, p.k_bufs.index(at).permute((1, 0)), nothing, use_acc=False)
        _release(p.k_free.index(at), alone)
        if POOLED:
            s = _hide_level(s * p.by, tile, begin, columns, BOX)
        else:
            s = _hide(s * p.by, tile.entries, begin, columns, BOX)
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
            _release(p.k_free.index(at), alone)
            if POOLED:
                if _is_plain(tile, i):
                    level = _level_of(tile, i)
                    weights, m, mass, fade = _soften_level(s, m, mass, p.by, level)
                else:
                    s = _hide_level(s * p.by, tile, i, columns, BOX)
                    weights, m, mass, fade = _soften(s, m, mass)
            elif i >= tile.plain_0:
                s = _hide(s * p.by, tile.entries, i, columns, BOX)
                weights, m, mass, fade = _soften(s, m, mass)
            else:
                weights, m, mass, fade = _soften_plain(s, m, mass, p.by)
            acc, a = warpgroup_mma_wait(0, deps=(acc_next, a))
            _release(p.v_free.index(v_at), alone)
            v_turn += step
            acc = acc * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
            a = gl.convert_layout(weights.to(dtype), operand)
        v_at = v_turn % v_stages
        mbarrier.wait(p.v_ready.index(v_at), (v_turn // v_stages) & 1)
        acc = warpgroup_mma(a, p.v_bufs.index(v_at), acc)
        _release(p.v_free.index(v_at), alone)
    if FIRST_ORDER:
        v_turn = v_first + p.rest_turns + turns
        v_at = v_turn % v_stages
        mbarrier.wait(p.v_ready.index(v_at), (v_turn // v_stages) & 1)
        none = gl.zeros([rows, depth], gl.float32, result)
        first = warpgroup_mma(q_buf, p.v_bufs.index(v_at).slice(0, depth), none, use_acc=False)
        # of both groups, be they alone or not
        mbarrier.arrive(p.v_free.index(v_at), count=1)
        fade = gl.where(rest_mass == 0.0, 0.0, rest_mass * gl.exp2(rest_m - m))
        acc += first * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
    if WEIGHT == 0:  # noqa: SIM102
        if step == 2:
            if group == 1:
                mbarrier.wait(p.handed_free, (joins & 1) ^ 1)
                p.handed.store(acc)
                p.sums.index(0).store(m)
                p.sums.index(1).store(mass)
                barrier()
                mbarrier.arrive(p.joined, count=1)
            else:
                mbarrier.wait(p.joined, joins & 1)
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
                barrier()
                mbarrier.arrive(p.handed_free, count=1)

    total = gl.where(mass == 0.0, 1.0, mass)
    norm = gl.where(mass == 0.0, float("-inf"), (m + gl.log2(total)) * 0.6931471805599453)
    acc = acc / gl.expand_dims(gl.convert_layout(total, acc_row), 1)
    target = (
        p.out
        + b * p.out_b
        + h * p.out_h
        + gl.expand_dims(acc_token, 1) * p.out_l
        + gl.expand_dims(acc_column, 0)
    )
    gl.store(target, acc.to(p.out.dtype.element_ty), mask=gl.expand_dims(acc_inside, 1))
    norm = gl.convert_layout(norm, acc_row)
    gl.store(p.lse + one * p.length + acc_token, norm, mask=acc_inside)
