"""A tile of queries on its way from the warp that takes it to the groups that compute it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.core import _aggregate as aggregate

from dit_accel.kernels.gluon_names import barrier


class _Tile:
    """A tile of queries: where it lies, its turns by level, and where these stop being plain."""

    span: gl.tensor
    head: gl.tensor
    block: gl.tensor
    turns: gl.tensor
    plain_0: gl.tensor
    turn_1: gl.tensor
    turn_2: gl.tensor
    turn_3: gl.tensor
    plain_1: gl.tensor
    plain_2: gl.tensor
    plain_3: gl.tensor
    entries: gl.tensor

    @gluon.constexpr_function
    def __init__(self, *values):
        for name, value in zip(_TILE_FIELDS, values, strict=True):
            setattr(self, name, value)


_TILE_FIELDS = tuple(_Tile.__annotations__)
_Tile = aggregate(_Tile)  # type: ignore[misc]
TOLD = gl.constexpr(len(_TILE_FIELDS) - 1)
"""Numbers that are told of a tile: all but the address of its list."""


@gluon.jit
def find(p, pooled, tile, BOX: gl.constexpr, POOLED: gl.constexpr):
    """What a tile is, read from memory; a span of 0 holds nothing."""
    # text stands last, and its rows are long: those of all heads go first
    long = tile < p.pairs * p.long_tiles
    others = p.num_rows - p.long_tiles
    tile = gl.where(long, tile, tile - p.pairs * p.long_tiles)
    each = gl.maximum(gl.where(long, p.long_tiles, others), 1)
    head = tile // each
    b = (head // p.heads).to(gl.int64)
    h = (head % p.heads).to(gl.int64)
    last = gl.where(long, p.num_rows, others) - 1
    at = b * p.tile_b + h * p.tile_h + last - tile % each
    span = gl.load(p.q_span + at)
    block = gl.load(p.q_block + at) >> 4
    row = head.to(gl.int64) * p.rows + block
    width: gl.constexpr = p.k_bufs.shape[1]
    boxes: gl.constexpr = width // BOX
    if POOLED:
        own = p.counts + row * 8
        plain_0 = gl.load(own) // boxes
        turn_1 = (gl.load(own + 1) + boxes - 1) // boxes
        boxes_1: gl.constexpr = width // pooled[0].block_shape[0]
        plain_1 = turn_1 + gl.load(own + 2) // boxes_1
        turn_2 = turn_1 + (gl.load(own + 3) + boxes_1 - 1) // boxes_1
        boxes_2: gl.constexpr = width // pooled[1].block_shape[0]
        plain_2 = turn_2 + gl.load(own + 4) // boxes_2
        turn_3 = turn_2 + (gl.load(own + 5) + boxes_2 - 1) // boxes_2
        boxes_3: gl.constexpr = width // pooled[2].block_shape[0]
        plain_3 = turn_3 + gl.load(own + 6) // boxes_3
        turns = turn_3 + (gl.load(own + 7) + boxes_3 - 1) // boxes_3
    else:
        plain_0 = gl.load(p.counts + row * 2) // boxes
        turns = (gl.load(p.counts + row * 2 + 1) + boxes - 1) // boxes
        turn_1 = turns
        turn_2 = turns
        turn_3 = turns
        plain_1 = turns
        plain_2 = turns
        plain_3 = turns
    entries = p.listed + row * p.num_tiles
    return _Tile(
        span,
        head,
        block,
        turns,
        plain_0,
        turn_1,
        turn_2,
        turn_3,
        plain_1,
        plain_2,
        plain_3,
        entries,
    )


@gluon.jit
def tell_one(p, at, field: gl.constexpr, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    p.told.index(at * TOLD + field).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def tell(p, number, tile, POOLED: gl.constexpr):
    """Hand a tile to the groups that compute it; two are on their way at most."""
    at = number & 1
    mbarrier.wait(p.told_free.index(at), ((number >> 1) & 1) ^ 1)
    tell_one(p, at, 0, tile.span)
    tell_one(p, at, 1, tile.head)
    tell_one(p, at, 2, tile.block)
    tell_one(p, at, 3, tile.turns)
    tell_one(p, at, 4, tile.plain_0)
    if POOLED:
        tell_one(p, at, 5, tile.turn_1)
        tell_one(p, at, 6, tile.turn_2)
        tell_one(p, at, 7, tile.turn_3)
        tell_one(p, at, 8, tile.plain_1)
        tell_one(p, at, 9, tile.plain_2)
        tell_one(p, at, 10, tile.plain_3)
    barrier()
    mbarrier.arrive(p.told_ready.index(at), count=1)


@gluon.jit
def heard(p, number, field: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(p.told.index((number & 1) * TOLD + field).load(layout), 0)


@gluon.jit
def hear(p, number, span, POOLED: gl.constexpr):
    """What was told of a tile, beside its span; nobody needs it there any more."""
    head = heard(p, number, 1)
    block = heard(p, number, 2)
    turns = heard(p, number, 3)
    plain_0 = heard(p, number, 4)
    if POOLED:
        turn_1 = heard(p, number, 5)
        turn_2 = heard(p, number, 6)
        turn_3 = heard(p, number, 7)
        plain_1 = heard(p, number, 8)
        plain_2 = heard(p, number, 9)
        plain_3 = heard(p, number, 10)
    else:
        turn_1 = turns
        turn_2 = turns
        turn_3 = turns
        plain_1 = turns
        plain_2 = turns
        plain_3 = turns
    barrier()
    mbarrier.arrive(p.told_free.index(number & 1), count=1)
    entries = p.listed + (head.to(gl.int64) * p.rows + block) * p.num_tiles
    return _Tile(
        span,
        head,
        block,
        turns,
        plain_0,
        turn_1,
        turn_2,
        turn_3,
        plain_1,
        plain_2,
        plain_3,
        entries,
    )
