"""A plan with pooled levels as one list a row, for a kernel that takes them all in one go.

Exact tiles and those of every level stand one after the other, each level's from the start of a
turn, in boxes that halve as the level doubles: a block of 64 keys is one box at every level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_attention.means import LEVELS, TURN, Rows, tables_with_means
from dit_accel.kernels.block_attention.means import SPECIMENS as TABLE_SPECIMENS
from dit_accel.kernels.block_attention.pairs import add_pairs
from dit_accel.kernels.block_attention.problem import AHEAD, Problem, some_of
from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import LENGTH_BITS, START_BIT, Compact, Tiles
from dit_accel.kernels.specimen import Specimen, typed

TABLE_BYTES = 2**30
"""What the keys, the values and their means of the heads that are taken at once may take."""
_MOST, _PER_WARP = 256, 256
"""Blocks of a row that are looked at together, and by one warp."""
_BITS = tl.constexpr(START_BIT)
_COUNT = tl.constexpr(LENGTH_BITS)


@triton.jit
def _boxes(codes, sizes, number, columns, LOG: tl.constexpr):
    """Blocks of a row at the levels that they have in a plan: none, if they are not computed.

    Their level, in powers of two, the logarithm of its boxes, how many of these are full, means
    beyond these, and keys beyond the means of full length.
    """
    inside = number < columns
    kind = tl.load(codes + number, mask=inside, other=0).to(tl.int32)
    keys = tl.load(sizes + number, mask=inside & (kind > 0), other=0)
    level = (kind >= 2).to(tl.int32) + (kind >= 4).to(tl.int32) + (kind >= 8).to(tl.int32)
    log = tl.maximum(LOG - level, 3)
    whole = keys >> level
    full = whole >> log
    return level, log, full, whole - (full << log), keys - (whole << level)


@triton.jit
def _by_level(number, level):
    """A count in the 16 bits of its level: one sum then adds up all levels."""
    return number.to(tl.int64) << (16 * level).to(tl.int64)


@triton.jit
def _field(counts, level):
    return ((counts >> (16 * level).to(tl.int64)) & 0xFFFF).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        *("heads", "rows", "columns", "width"),
        *("code_b", "code_h", "first_b", "first_h", "size_b", "size_h", "bound_b", "bound_h"),
    ]
)
def pack_levels_kernel(
    code,
    first,
    sizes,
    bounds,
    listed,
    counts,
    pairs,
    heads,
    rows,
    columns,
    width,
    code_b,
    code_h,
    first_b,
    first_h,
    size_b,
    size_h,
    bound_b,
    bound_h,
    LOG: tl.constexpr,
    CHUNK: tl.constexpr,
    PER: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The tiles of a row of a plan by level, those of full length first, in rising order."""
    row, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    codes = code + b * code_b + h * code_h + row.to(tl.int64) * columns
    first += b * first_b + h * first_h
    sizes += b * size_b + h * size_h
    place = head.to(tl.int64) * rows + row
    target = listed + place * width
    all_full = tl.zeros([1], tl.int64)
    all_short = tl.zeros([1], tl.int64)
    exact = 0
    for begin in range(0, columns, CHUNK):
        number = begin + tl.arange(0, CHUNK)
        level, log, full, means, keys = _boxes(codes, sizes, number, columns, LOG)
        short = (means > 0).to(tl.int32) + (keys > 0).to(tl.int32)
        all_full += tl.sum(_by_level(full, level), 0)
        all_short += tl.sum(_by_level(short, level), 0)
        exact += tl.sum(tl.where(level == 0, (full << log) + means, 0), 0)
    add_pairs(pairs + head, bounds + b * bound_b + h * bound_h + row, exact)
    # a turn is of one level, and what it lacks holds nothing
    every = tl.arange(0, 4)
    fulls = _field(all_full, every)
    found = fulls + _field(all_short, every)
    per = PER >> tl.maximum(LOG - every, 3)
    padded = (found + per - 1) // per * per
    ends = tl.cumsum(padded, 0)
    tl.store(counts + place * 8 + 2 * every, fulls)
    tl.store(counts + place * 8 + 2 * every + 1, found)
    lacking = found[:, None] + tl.arange(0, 16)[None, :]
    nothing = tl.zeros([4, 16], tl.int32)
    at = target + (ends - padded)[:, None] + lacking
    tl.store(at, nothing, mask=lacking < padded[:, None])
    # some more, which are read ahead
    tl.store(target + tl.max(ends, 0) + tl.arange(0, AHEAD), tl.zeros([AHEAD], tl.int32))

    at_1 = tl.sum(tl.where(every < 1, padded, 0), 0)
    at_2 = tl.sum(tl.where(every < 2, padded, 0), 0)
    at_3 = tl.sum(tl.where(every < 3, padded, 0), 0)
    some_short = tl.max(all_short, 0) > 0
    done = tl.zeros([1], tl.int64)
    done_short = all_full
    for begin in range(0, columns, CHUNK):
        number = begin + tl.arange(0, CHUNK)
        level, log, full, means, keys = _boxes(codes, sizes, number, columns, LOG)
        known = full + means + keys > 0
        start = tl.load(first + level * (columns + 1) + number, mask=known, other=0)
        pooled = ((1 << level) - 1) << _COUNT
        base = tl.where(level == 1, at_1, 0) + tl.where(level == 2, at_2, 0)
        base += tl.where(level == 3, at_3, 0)
        one = _by_level(full, level)
        rank = base + _field(tl.cumsum(one, 0) - one + done, level)
        for i in range(0, tl.max(full, 0)):
            entry = ((start + (i << log)) << _BITS) | pooled | (1 << log)
            tl.store(target + rank + i, entry, mask=i < full)
        done += tl.sum(one, 0)
        if some_short:
            short = (means > 0).to(tl.int32) + (keys > 0).to(tl.int32)
            one = _by_level(short, level)
            rank = base + _field(tl.cumsum(one, 0) - one + done_short, level)
            begins = start + (full << log)
            tl.store(target + rank, (begins << _BITS) | pooled | means, mask=means > 0)
            rank += (means > 0).to(tl.int32)
            last = ((begins + means) << _BITS) | ((keys - 1) << _COUNT) | 1
            tl.store(target + rank, last, mask=keys > 0)
            done_short += tl.sum(one, 0)


def packed_levels(
    code: Tensor, found: Rows, q_offsets: Tensor, pairs: Tensor, heads: int, size: int
) -> tuple[Tensor, Tensor]:
    """Every row's tiles as a list, and how many of full length and in all, by level.

    Args:
        code: int8 ``[B|1, H|1, Nq, Nk]``, contiguous.
        found: where the blocks stand.
        q_offsets: int32 ``[B|1, H|1, Nq + 1]``, contiguous: the queries of every row.
        pairs: int64 ``[B, H]``, to which the exact pairs are added.
        heads: of the lists.
        size: of an exact tile, a power of two.

    Returns:
        int32 ``[B, H, Nq, most]``; int32 ``[B, H, Nq, 8]``.
    """
    batch = pairs.numel() // heads
    rows, columns = code.shape[2:]
    listed = code.new_empty((batch, heads, rows, found.most), dtype=torch.int32)
    counts = code.new_empty((batch, heads, rows, 2 * len(LEVELS)), dtype=torch.int32)
    launch(
        pack_levels_kernel,
        (rows, batch * heads),
        (code, found.first, found.sizes, q_offsets, listed, counts, pairs),
        (
            *(heads, rows, columns, found.most, *lead_strides(code)),
            *(*lead_strides(found.first), *lead_strides(found.sizes), *lead_strides(q_offsets)),
        ),
        **_pack_constants(size, columns),
    )
    return listed, counts


def _pack_constants(size: int, columns: int) -> dict[str, int]:
    chunk = min(_MOST, max(32, triton.next_power_of_2(columns)))
    constants = {"LOG": size.bit_length() - 1, "CHUNK": chunk, "PER": TURN, "AHEAD": AHEAD}
    return {**constants, "num_warps": max(1, chunk // _PER_WARP)}


def head_groups(
    k: Tensor, found: Rows, whole: bool = False
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Heads whose tables fit `TABLE_BYTES`, as what cuts ``[B|1, H|1, ...]`` to them; or all."""
    batch, heads, _, depth = k.shape
    if whole:
        yield partial(some_of, batch=slice(batch), heads=slice(heads))
        return
    each = 2 * found.height * depth * k.element_size()
    groups = -(-heads * each // TABLE_BYTES)
    step = -(-heads // min(heads, groups))
    for b in range(batch):
        for h in range(0, heads, step):
            yield partial(some_of, batch=slice(b, b + 1), heads=slice(h, h + step))


def level_problem(
    some: Callable[[Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    code: Tensor,
    queries: Compact,
    q_tiles: Tiles,
    keys: Compact,
    found: Rows,
    size: int,
    pairs: Tensor,
) -> Problem:
    """The problem of some heads, but for its scale and where results go: tables and lists.

    Args:
        some: of `head_groups`.
        q, k, v: ``[B, H, L, D]``, in the model's order.
        code: int8 ``[B|1, H|1, Nq, Nk]``, contiguous.
        queries, q_tiles: order and tiles of queries.
        keys, found: order of the keys, and where their blocks stand.
        size: of an exact tile.
        pairs: int64 ``[B, H]``, where pairs are counted.
    """
    query = some(q)
    found = found._replace(first=some(found.first), sizes=some(found.sizes))
    order = Compact(*(some(x) for x in keys))
    of_queries, pairs = Compact(*(some(x) for x in queries)), some(pairs)
    tables = tables_with_means(some(k), some(v), order, found, pairs)
    bounds = of_queries.offsets
    listed, counts = packed_levels(some(code), found, bounds, pairs, query.shape[1], size)
    return Problem(
        query if query.stride(-1) == 1 else query.contiguous(),
        *tables,
        of_queries,
        Tiles(*(some(x) for x in q_tiles)),
        listed,
        counts,
        pairs,
        some(code),
        1.0,
        query,
        query,
    )


def _specimens() -> Iterator[Specimen]:
    ints = {
        **dict.fromkeys(("first", "sizes", "bounds", "listed", "counts"), "*i32"),
        "code": "*i8",
        "pairs": "*i64",
    }
    for size, columns in ((64, 2048), (16, 100)):
        constants = _pack_constants(size, columns)
        options = {"num_warps": constants.pop("num_warps")}
        signature = typed(pack_levels_kernel, constants, **ints)
        yield Specimen(f"pack levels {size}", pack_levels_kernel, signature, constants, options)


SPECIMENS = (
    [*_specimens(), *TABLE_SPECIMENS] if isinstance(pack_levels_kernel, triton.JITFunction) else []
)
