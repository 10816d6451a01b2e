"""A plan with pooled levels as one list a row, for a kernel that takes them all in one go.

Exact tiles and those of every level stand one after the other, each level's from the start of a
turn, in boxes that halve as the level doubles: a block of 64 keys is one box at every level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_attention.problem import AHEAD, Problem, some_of
from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import LENGTH_BITS, START_BIT, Compact, Tiles
from dit_accel.kernels.specimen import Specimen, typed

LEVELS = (1, 2, 4, 8)
TURN = 128
"""Rows that a kernel takes at once."""
TABLE_BYTES = 2**30
"""What the keys, the values and their means of the heads that are taken at once may take."""
_SMALLEST = 8
_MOST, _PER_WARP = 256, 256
"""Blocks of a row that are looked at together, and by one warp."""
_GROUPS = 8
"""Runs of 8 keys that a program pools at once."""
_BITS = tl.constexpr(START_BIT)
_COUNT = tl.constexpr(LENGTH_BITS)


def box_of(level: int, size: int) -> int:
    """Rows of a box of a level, where exact ones have ``size``."""
    return max(_SMALLEST, size // level)


class Rows(NamedTuple):
    """Where every block stands in a table of keys, with the means of each level behind them.

    ``first`` int32 ``[B|1, H|1, 4, N + 1]``, by level, where the rows of a block begin, and where
    those of the last end; ``sizes`` int32 ``[B|1, H|1, N]``, keys of a block; ``height``, rows of
    the table; ``most``, entries that a row's list can need, whatever the plan.
    """

    first: Tensor
    sizes: Tensor
    height: int
    most: int


def rows_of(offsets: Tensor, length: int, size: int, longest: int | None) -> Rows:
    """Lay blocks out in a table.

    Args:
        offsets: int32 ``[B|1, H|1, N + 1]``.
        length: keys in all, padding included.
        size: of an exact tile.
        longest: keys of the longest block, where the caller knows.
    """
    sizes = offsets.diff(dim=-1).contiguous()
    blocks = sizes.shape[-1]
    firsts, height = [offsets], length
    for level in LEVELS[1:]:
        ends = (-(-sizes // level)).cumsum(-1) + height
        firsts.append(torch.nn.functional.pad(ends, (1, 0), value=height))
        most = blocks + length // level
        height += most if longest is None else min(most, blocks * -(-longest // level))
    tiles = blocks + length // size
    if longest is not None:
        tiles = min(tiles, blocks * -(-longest // size))
    # a block has at most one tile more at another level, for what is left over
    most = tiles + blocks + len(LEVELS) * (TURN // _SMALLEST) + AHEAD
    return Rows(torch.stack(firsts, -2).to(torch.int32).contiguous(), sizes, height, most)


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
        *("code_b", "code_h", "first_b", "first_h", "size_b", "size_h"),
    ]
)
def pack_levels_kernel(
    code,
    first,
    sizes,
    listed,
    counts,
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
    for begin in range(0, columns, CHUNK):
        number = begin + tl.arange(0, CHUNK)
        level, log, full, means, keys = _boxes(codes, sizes, number, columns, LOG)
        short = (means > 0).to(tl.int32) + (keys > 0).to(tl.int32)
        all_full += tl.sum(_by_level(full, level), 0)
        all_short += tl.sum(_by_level(short, level), 0)
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
    code: Tensor, found: Rows, batch: int, heads: int, size: int
) -> tuple[Tensor, Tensor]:
    """Every row's tiles as a list, and how many of full length and in all, by level.

    Args:
        code: int8 ``[B|1, H|1, Nq, Nk]``, contiguous.
        found: where the blocks stand.
        batch, heads: of the lists.
        size: of an exact tile, a power of two.

    Returns:
        int32 ``[B, H, Nq, most]``; int32 ``[B, H, Nq, 8]``.
    """
    rows, columns = code.shape[2:]
    listed = code.new_empty((batch, heads, rows, found.most), dtype=torch.int32)
    counts = code.new_empty((batch, heads, rows, 2 * len(LEVELS)), dtype=torch.int32)
    launch(
        pack_levels_kernel,
        (rows, batch * heads),
        (code, found.first, found.sizes, listed, counts),
        (
            *(heads, rows, columns, found.most, *lead_strides(code)),
            *(*lead_strides(found.first), *lead_strides(found.sizes)),
        ),
        **_pack_constants(size, columns),
    )
    return listed, counts


def _pack_constants(size: int, columns: int) -> dict[str, int]:
    chunk = min(_MOST, max(32, triton.next_power_of_2(columns)))
    constants = {"LOG": size.bit_length() - 1, "CHUNK": chunk, "PER": TURN, "AHEAD": AHEAD}
    return {**constants, "num_warps": max(1, chunk // _PER_WARP)}


@triton.jit
def _row(x, stride, perm, place, stop, depth):
    """Rows of a block, zero beyond its end."""
    inside = place < stop
    token = tl.load(perm + place, mask=inside, other=0).to(tl.int64)
    return tl.load(x + token[:, None] * stride + depth, mask=inside[:, None], other=0.0)


@triton.jit
def _write_row(table, row, place, stop, depth):
    """Write rows in their order, and take them on in fp32."""
    at = place.to(tl.int64)[:, None] * (depth.shape[1]) + depth
    tl.store(table + at, row, mask=(place < stop)[:, None])
    return row.to(tl.float32)


@triton.jit
def _write_mean(table, total, place, left, depth, LEVEL: tl.constexpr):
    """Means of the sums of up to so many rows, of which ``left`` are still in the block."""
    by = tl.minimum(tl.maximum(left, 1), LEVEL).to(tl.float32)
    mean = total / by[:, None]
    at = place.to(tl.int64)[:, None] * (depth.shape[1]) + depth
    tl.store(table + at, mean.to(table.dtype.element_ty), mask=(left > 0)[:, None])


@triton.jit
def _pool(x, stride, table, perm, begin, stop, at_2, at_4, at_8, D: tl.constexpr, G: tl.constexpr):
    """Copy a block, and write its means."""
    depth = tl.arange(0, D)[None, :]
    group = tl.arange(0, G)
    for start in range(begin, stop, 8 * G):
        place = start + 8 * group
        done = start - begin
        left = stop - place
        # all are asked for before the first is written
        row_0 = _row(x, stride, perm, place, stop, depth)
        row_1 = _row(x, stride, perm, place + 1, stop, depth)
        row_2 = _row(x, stride, perm, place + 2, stop, depth)
        row_3 = _row(x, stride, perm, place + 3, stop, depth)
        row_4 = _row(x, stride, perm, place + 4, stop, depth)
        row_5 = _row(x, stride, perm, place + 5, stop, depth)
        row_6 = _row(x, stride, perm, place + 6, stop, depth)
        row_7 = _row(x, stride, perm, place + 7, stop, depth)
        a = _write_row(table, row_0, place, stop, depth)
        a += _write_row(table, row_1, place + 1, stop, depth)
        b = _write_row(table, row_2, place + 2, stop, depth)
        b += _write_row(table, row_3, place + 3, stop, depth)
        c = _write_row(table, row_4, place + 4, stop, depth)
        c += _write_row(table, row_5, place + 5, stop, depth)
        d = _write_row(table, row_6, place + 6, stop, depth)
        d += _write_row(table, row_7, place + 7, stop, depth)
        second = at_2 + done // 2 + 4 * group
        _write_mean(table, a, second, left, depth, 2)
        _write_mean(table, b, second + 1, left - 2, depth, 2)
        _write_mean(table, c, second + 2, left - 4, depth, 2)
        _write_mean(table, d, second + 3, left - 6, depth, 2)
        fourth = at_4 + done // 4 + 2 * group
        _write_mean(table, a + b, fourth, left, depth, 4)
        _write_mean(table, c + d, fourth + 1, left - 4, depth, 4)
        _write_mean(table, (a + b) + (c + d), at_8 + done // 8 + group, left, depth, 8)


@triton.jit(
    do_not_specialize=["heads", "blocks", "height", "perm_b", "perm_h", "first_b", "first_h"]
)
def levels_kernel(
    k,
    v,
    perm,
    first,
    keys,
    values,
    zero,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    heads,
    blocks,
    height,
    perm_b,
    perm_h,
    first_b,
    first_h,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A block of keys and values in its order, and its means, each read once."""
    j, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    perm += b * perm_b + h * perm_h
    first += b * first_b + h * first_h
    begin, stop = tl.load(first + j), tl.load(first + j + 1)
    at_2 = tl.load(first + blocks + 1 + j)
    at_4 = tl.load(first + 2 * (blocks + 1) + j)
    at_8 = tl.load(first + 3 * (blocks + 1) + j)
    keys += head.to(tl.int64) * height * D
    values += head.to(tl.int64) * height * D
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    _pool(k, k_l, keys, perm, begin, stop, at_2, at_4, at_8, D, GROUPS)
    _pool(v, v_l, values, perm, begin, stop, at_2, at_4, at_8, D, GROUPS)
    if (j == 0) & (head == 0):
        tl.store(zero, 0)
    # rows that no block has are read beside the last ones
    zeros = tl.zeros([GROUPS, D], keys.dtype.element_ty)
    for i in tl.static_range(4):
        ends = tl.load(first + i * (blocks + 1) + blocks)
        until = height
        if i < 3:
            until = tl.load(first + (i + 1) * (blocks + 1))
        for row in range(ends + j * GROUPS, until, blocks * GROUPS):
            place = (row + tl.arange(0, GROUPS))[:, None]
            at = place.to(tl.int64) * D + tl.arange(0, D)[None, :]
            tl.store(keys + at, zeros, mask=place < until)
            tl.store(values + at, zeros, mask=place < until)


def tables_with_means(
    k: Tensor, v: Tensor, order: Compact, found: Rows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values in the order, and behind them the means of every level.

    Args:
        k, v: ``[B, H, L, D]``.
        order: of the keys.
        found: where its blocks stand.

    Returns:
        As `Problem` has them, ``[B, H, height, D]``, zero in rows that no block has; with the rows
        of both, and a 0.
    """
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, heads, _, depth = k.shape
    table = torch.empty((2, batch, heads, found.height, depth), dtype=k.dtype, device=k.device)
    taken = torch.empty(1, dtype=torch.int32, device=k.device)
    keys, values = table.unbind()
    blocks = found.sizes.shape[-1]
    launch(
        levels_kernel,
        (blocks, batch * heads),
        (k, v, order.perm, found.first, keys, values, taken),
        (
            *(*k.stride()[:3], *v.stride()[:3], heads, blocks, found.height),
            *(*lead_strides(order.perm), *lead_strides(found.first)),
        ),
        **_table_constants(depth),
    )
    return keys, values, table.view(-1, depth), taken


def _table_constants(depth: int) -> dict[str, int]:
    return {"D": depth, "GROUPS": _GROUPS, "num_warps": max(1, _GROUPS * depth // 256)}


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
) -> Problem:
    """The problem of some heads, but for its scale and where results go: tables and lists.

    Args:
        some: of `head_groups`.
        q, k, v: ``[B, H, L, D]``, in the model's order.
        code: int8 ``[B|1, H|1, Nq, Nk]``, contiguous.
        queries, q_tiles: order and tiles of queries.
        keys, found: order of the keys, and where their blocks stand.
        size: of an exact tile.
    """
    query = some(q)
    found = found._replace(first=some(found.first), sizes=some(found.sizes))
    order = Compact(*(some(x) for x in keys))
    listed, counts = packed_levels(some(code), found, query.shape[0], query.shape[1], size)
    return Problem(
        query if query.stride(-1) == 1 else query.contiguous(),
        *tables_with_means(some(k), some(v), order, found),
        Compact(*(some(x) for x in queries)),
        Tiles(*(some(x) for x in q_tiles)),
        listed,
        counts,
        some(code),
        1.0,
        query,
        query,
    )


def _specimens() -> Iterator[Specimen]:
    ints = {
        **dict.fromkeys(("first", "sizes", "listed", "counts", "perm", "zero"), "*i32"),
        "code": "*i8",
    }
    for size, columns in ((64, 2048), (16, 100)):
        constants = _pack_constants(size, columns)
        options = {"num_warps": constants.pop("num_warps")}
        signature = typed(pack_levels_kernel, constants, **ints)
        yield Specimen(f"pack levels {size}", pack_levels_kernel, signature, constants, options)
    for dtype, depth in (("bf16", 128), ("fp16", 64)):
        constants = _table_constants(depth)
        options = {"num_warps": constants.pop("num_warps")}
        rows = dict.fromkeys(("k", "v", "keys", "values"), f"*{dtype}")
        yield Specimen(
            f"keys and means {dtype} D{depth}",
            levels_kernel,
            typed(levels_kernel, constants, **ints, **rows),
            constants,
            options,
            aligned=("k_b", "k_h", "k_l", "v_b", "v_h", "v_l"),
        )


SPECIMENS = list(_specimens()) if isinstance(pack_levels_kernel, triton.JITFunction) else []
