"""The warp that takes tiles and brings keys and values, for block attention on Hopper, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dit_accel.kernels.block_attention.tile import find, tell, tell_one
from dit_accel.kernels.block_attention.warps import _rows_of
from dit_accel.kernels.gluon_names import barrier, load_box


@gluon.jit
def _bring(desc, wide, row, places, full, buffer, ready, BOX: gl.constexpr):
    """The boxes of one turn of a list into one buffer; full ones of a run at once, 64 rows each.

    ``full``: how many of the boxes, the first ones, are full. These rise by a box at least.
    """
    width: gl.constexpr = buffer.shape[0]
    depth: gl.constexpr = buffer.shape[1]
    boxes: gl.constexpr = 64 // BOX
    mbarrier.expect(ready, width * depth * 2)
    for part in gl.static_range(width // 64):
        first = places[part * boxes]
        if BOX == 64:
            load_box(desc, [row + first, 0], ready, buffer.slice(part * 64, 64))
        elif (places[part * boxes + boxes - 1] == first + 64 - BOX) & ((part + 1) * boxes <= full):
            load_box(wide, [row + first, 0], ready, buffer.slice(part * 64, 64))
        else:
            for i in gl.static_range(boxes):
                place = places[part * boxes + i]
                load_box(desc, [row + place, 0], ready, buffer.slice(part * 64 + i * BOX, BOX))


@gluon.jit
def _bring_run(desc, row, buffer, ready):
    """Consecutive rows into one buffer, by boxes of 64."""
    width: gl.constexpr = buffer.shape[0]
    depth: gl.constexpr = buffer.shape[1]
    mbarrier.expect(ready, width * depth * 2)
    for i in gl.static_range(width // 64):
        load_box(desc, [row + i * 64, 0], ready, buffer.slice(i * 64, 64))


@gluon.jit
def _bring_turns(
    p, desc, wide, tile, entries, first, stop, plain, k_turn, v_turn, BOX: gl.constexpr
):
    """Some turns of a list, keys and values; the boxes of the first ``plain`` are full."""
    k_stages: gl.constexpr = p.k_bufs.shape[0]
    v_stages: gl.constexpr = p.v_bufs.shape[0]
    boxes: gl.constexpr = p.k_bufs.shape[1] // BOX
    k_row = tile.head * p.table
    v_row = (p.pairs + tile.head) * p.table
    for i in range(first, stop):
        places = _rows_of(entries, i, 0, boxes)
        full = (plain - i) * boxes
        at = k_turn % k_stages
        mbarrier.wait(p.k_free.index(at), ((k_turn // k_stages) & 1) ^ 1)
        _bring(desc, wide, k_row, places, full, p.k_bufs.index(at), p.k_ready.index(at), BOX)
        k_turn += 1
        at = v_turn % v_stages
        mbarrier.wait(p.v_free.index(at), ((v_turn // v_stages) & 1) ^ 1)
        _bring(desc, wide, v_row, places, full, p.v_bufs.index(at), p.v_ready.index(at), BOX)
        v_turn += 1
    return k_turn, v_turn


@gluon.jit
def producer(
    p,
    desc,
    wide,
    pooled,
    rest,
    BOX: gl.constexpr,
    WEIGHT: gl.constexpr,
    FIRST_ORDER: gl.constexpr,
    POOLED: gl.constexpr,
):
    """Takes tiles, and brings the rest's means, then the listed keys and values, level by level."""
    k_stages: gl.constexpr = p.k_bufs.shape[0]
    v_stages: gl.constexpr = p.v_bufs.shape[0]
    width: gl.constexpr = p.k_bufs.shape[1]
    depth: gl.constexpr = p.k_bufs.shape[2]
    k_turn = gl.to_tensor(0)
    v_turn = gl.to_tensor(0)
    number = gl.to_tensor(0)
    taken = gl.program_id(0)
    while taken < p.num_rows * p.pairs:
        tile = find(p, pooled, taken, BOX, POOLED)
        if tile.span != 0:
            tell(p, number, tile, POOLED)
            number += 1
            every = p.pairs * p.columns
            row = tile.head * p.columns
            for _ in range(p.rest_turns):
                at = k_turn % k_stages
                mbarrier.wait(p.k_free.index(at), ((k_turn // k_stages) & 1) ^ 1)
                _bring_run(rest, row, p.k_bufs.index(at), p.k_ready.index(at))
                k_turn += 1
                if WEIGHT != 0:
                    at = k_turn % k_stages
                    mbarrier.wait(p.k_free.index(at), ((k_turn // k_stages) & 1) ^ 1)
                    _bring_run(rest, row + 2 * every, p.k_bufs.index(at), p.k_ready.index(at))
                    k_turn += 1
                at = v_turn % v_stages
                mbarrier.wait(p.v_free.index(at), ((v_turn // v_stages) & 1) ^ 1)
                _bring_run(rest, row + every, p.v_bufs.index(at), p.v_ready.index(at))
                v_turn += 1
                row += width
            at = tile.entries
            k_turn, v_turn = _bring_turns(
                p, desc, wide, tile, at, 0, tile.turn_1, tile.plain_0, k_turn, v_turn, BOX
            )
            if POOLED:
                box_1: gl.constexpr = pooled[0].block_shape[0]
                box_2: gl.constexpr = pooled[1].block_shape[0]
                box_3: gl.constexpr = pooled[2].block_shape[0]
                at += tile.turn_1 * (width // BOX)
                turns = tile.turn_2 - tile.turn_1
                plain = tile.plain_1 - tile.turn_1
                k_turn, v_turn = _bring_turns(
                    p, pooled[0], wide, tile, at, 0, turns, plain, k_turn, v_turn, box_1
                )
                at += turns * (width // box_1)
                turns = tile.turn_3 - tile.turn_2
                plain = tile.plain_2 - tile.turn_2
                k_turn, v_turn = _bring_turns(
                    p, pooled[1], wide, tile, at, 0, turns, plain, k_turn, v_turn, box_2
                )
                at += turns * (width // box_2)
                turns = tile.turns - tile.turn_3
                plain = tile.plain_3 - tile.turn_3
                k_turn, v_turn = _bring_turns(
                    p, pooled[2], wide, tile, at, 0, turns, plain, k_turn, v_turn, box_3
                )
            if FIRST_ORDER:
                at = v_turn % v_stages
                mbarrier.wait(p.v_free.index(at), ((v_turn // v_stages) & 1) ^ 1)
                cov_row = every * (3 if WEIGHT != 0 else 2) + tile.head * depth
                buffer = p.v_bufs.index(at).slice(0, depth)
                _bring_run(rest, cov_row, buffer, p.v_ready.index(at))
                v_turn += 1
        taken = gl.atomic_add(p.taken, 1, sem="relaxed") + gl.num_programs(0)
    # the others stop at a tile that holds nothing
    at = number & 1
    mbarrier.wait(p.told_free.index(at), ((number >> 1) & 1) ^ 1)
    tell_one(p, at, 0, 0)
    barrier()
    mbarrier.arrive(p.told_ready.index(at), count=1)
