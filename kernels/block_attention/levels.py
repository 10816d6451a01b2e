"""A plan with pooled levels as one list a row, for a kernel that takes them all in one go.

Exact tiles and those of every level stand one after the other, each level's from the start of a
turn, in boxes that halve as the level doubles: a block of 64 keys is one box at every level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_attention.problem import AHEAD, Problem, some_of, tables_of
from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import (
    BLOCK_BIT,
    LENGTH_BITS,
    START_BIT,
    Compact,
    Pooled,
    Tiles,
    remembered,
)
from dit_accel.kernels.specimen import Specimen, typed

LEVELS = (1, 2, 4, 8)
TURN = 128
"""Rows that a kernel takes at once."""
TABLE_BYTES = 2**30
"""What the keys, the values and their means of the heads that are taken at once may take."""
_SMALLEST = 8
_CHUNK = 1024
"""Tiles of a row that are looked at together."""
_BLOCK = tl.constexpr(BLOCK_BIT)


def box_of(level: int, size: int) -> int:
    """Rows of a box of a level, where exact ones have ``size``."""
    return max(_SMALLEST, size // level)


def _boxes(size: int) -> dict[str, int]:
    return {f"BOX_{i}": box_of(level, size) for i, level in enumerate(LEVELS)}


@triton.jit
def _pack_level(
    codes,
    block,
    span,
    begin,
    known,
    target,
    counts,
    LEVEL: tl.constexpr,
    BOX: tl.constexpr,
    CHUNK: tl.constexpr,
    PER: tl.constexpr,
):
    """The tiles of one level of a row, and how many entries they take."""
    done = 0
    full = 0
    # those of full length come first, those that do not exist last
    plain = tl.load(known)
    exist = tl.load(known + 1)
    for first in range(0, exist, CHUNK):
        number = first + tl.arange(0, CHUNK)
        inside = number < exist
        of = tl.load(block + begin + number, mask=inside, other=0)
        where = tl.load(span + begin + number, mask=inside, other=0)
        kind = tl.load(codes + (of >> _BLOCK), mask=inside, other=0)
        chosen = inside & (kind == LEVEL)
        rank = tl.cumsum(chosen.to(tl.int32), 0)
        tl.store(target + done + rank - 1, where, mask=chosen)
        done += tl.sum(chosen.to(tl.int32), 0)
        full += tl.sum((chosen & (number < plain)).to(tl.int32), 0)
    tl.store(counts, full)
    tl.store(counts + 1, done)
    # a turn is of one level, and what it lacks holds nothing
    padded = (done + PER // BOX - 1) // (PER // BOX) * (PER // BOX)
    missing = done + tl.arange(0, PER // BOX)
    tl.store(target + missing, tl.zeros([PER // BOX], tl.int32), mask=missing < padded)
    return padded


@triton.jit(
    do_not_specialize=[
        *("heads", "rows", "columns", "width", "first_1", "first_2", "first_3"),
        *("code_b", "code_h", "tile_b", "tile_h", "known_b", "known_h"),
    ]
)
def pack_levels_kernel(
    code,
    block,
    span,
    known,
    listed,
    counts,
    heads,
    rows,
    columns,
    width,
    first_1,
    first_2,
    first_3,
    code_b,
    code_h,
    tile_b,
    tile_h,
    known_b,
    known_h,
    BOX_0: tl.constexpr,
    BOX_1: tl.constexpr,
    BOX_2: tl.constexpr,
    BOX_3: tl.constexpr,
    CHUNK: tl.constexpr,
    PER: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The tiles of a row of a plan by level, those of full length first, in rising order."""
    row, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    codes = code + b * code_b + h * code_h + row.to(tl.int64) * columns
    block += b * tile_b + h * tile_h
    span += b * tile_b + h * tile_h
    known += b * known_b + h * known_h
    place = head.to(tl.int64) * rows + row
    at = listed + place * width
    counts += place * 8
    at += _pack_level(codes, block, span, 0, known, at, counts, 1, BOX_0, CHUNK, PER)
    known += 2
    counts += 2
    at += _pack_level(codes, block, span, first_1, known, at, counts, 2, BOX_1, CHUNK, PER)
    known += 2
    counts += 2
    at += _pack_level(codes, block, span, first_2, known, at, counts, 4, BOX_2, CHUNK, PER)
    known += 2
    counts += 2
    at += _pack_level(codes, block, span, first_3, known, at, counts, 8, BOX_3, CHUNK, PER)
    # some more, which are read ahead
    tl.store(at + tl.arange(0, AHEAD), tl.zeros([AHEAD], tl.int32))


class Mixed(NamedTuple):
    """Tiles of all levels in one row: the exact ones, and from each of ``firsts`` another level's.

    Those of a level are ordered: of full length, shorter, and places that hold none. ``known``
    int32 ``[B|1, H|1, 8]``, by level, how many are of full length, and how many there are. ``most``
    is what a row's list can need, whatever the plan.
    """

    tiles: Tiles
    firsts: tuple[int, int, int]
    known: Tensor
    most: int


def mixed(exact: Tiles, pyramid: Pooled, columns: int, size: int) -> Mixed:
    """Join the tiles of exact blocks, of ``size``, and those of their pooled levels.

    A block has at most one tile more at another level than exact ones, for what is left over.
    """
    lead = torch.broadcast_shapes(exact.span.shape[:2], pyramid.tiles.span.shape[:2])
    widths = [pyramid.widths.get(level, 0) for level in LEVELS[1:]]
    pooled = (x.split(widths, -1) for x in pyramid.tiles)
    found = [exact, *(Tiles(*parts) for parts in zip(*pooled, strict=True))]
    blocks, spans, known = [], [], []
    for level, part in zip(LEVELS, found, strict=True):
        block, span = (x.expand(*lead, -1) for x in part)
        whole = (level - 1) << LENGTH_BITS | box_of(level, size)
        plain, none = (span & ((1 << START_BIT) - 1)) == whole, span == 0
        order = torch.where(plain, 0, torch.where(none, 2, 1)).sort(dim=-1, stable=True).indices
        blocks.append(block.gather(-1, order))
        spans.append(span.gather(-1, order))
        known += [plain.sum(-1), (~none).sum(-1)]
    firsts = list(accumulate(part.span.shape[-1] for part in found))
    return Mixed(
        Tiles(torch.cat(blocks, -1), torch.cat(spans, -1)),
        (firsts[0], firsts[1], firsts[2]),
        torch.stack(known, -1).to(torch.int32),
        exact.span.shape[-1] + columns + len(LEVELS) * (TURN // _SMALLEST) + AHEAD,
    )


def packed_levels(
    code: Tensor, found: Mixed, batch: int, heads: int, size: int
) -> tuple[Tensor, Tensor]:
    """Every row's tiles as a list, and how many of full length and in all, by level.

    Args:
        code: int8 ``[B|1, H|1, Nq, Nk]``, contiguous.
        found: tiles of ``size`` and of `box_of` every level.
        batch, heads: of the lists.
        size: of an exact tile.

    Returns:
        int32 ``[B, H, Nq, most]``; int32 ``[B, H, Nq, 8]``.
    """
    rows, columns = code.shape[2:]
    listed = code.new_empty((batch, heads, rows, found.most), dtype=torch.int32)
    counts = code.new_empty((batch, heads, rows, 2 * len(LEVELS)), dtype=torch.int32)
    launch(
        pack_levels_kernel,
        (rows, batch * heads),
        (code, found.tiles.block, found.tiles.span, found.known, listed, counts),
        (
            *(heads, rows, columns, found.most, *found.firsts),
            *(*lead_strides(code), *lead_strides(found.tiles.span), *lead_strides(found.known)),
        ),
        **_boxes(size),
        CHUNK=_CHUNK,
        PER=TURN,
        AHEAD=AHEAD,
    )
    return listed, counts


def head_groups(
    k: Tensor, pyramid: Pooled, whole: bool = False
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Heads whose tables fit `TABLE_BYTES`, as what cuts ``[B|1, H|1, ...]`` to them; or all."""
    batch, heads, _, depth = k.shape
    if whole:
        yield partial(some_of, batch=slice(batch), heads=slice(heads))
        return
    each = 2 * pyramid.height * depth * k.element_size()
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
    k_tiles: Tiles,
    pyramid: Pooled,
    size: int,
) -> Problem:
    """The problem of some heads, but for its scale and where results go: tables and lists.

    Args:
        some: of `head_groups`.
        q, k, v: ``[B, H, L, D]``, in the model's order.
        code: int8 ``[B|1, H|1, Nq, Nk]``, contiguous.
        queries, q_tiles: order and tiles of queries.
        keys, k_tiles: order of the keys, and exact tiles of ``size``.
        pyramid: their levels, in tiles of `box_of`.
        size: of an exact tile.
    """
    columns = code.shape[-1]
    found = remembered(
        keys.perm,
        keys.offsets,
        ("mixed", tuple(pyramid.widths), size, columns),
        lambda: mixed(k_tiles, pyramid, columns, size),
    )
    order = Compact(*(some(x) for x in keys))
    query = some(q)
    found = found._replace(tiles=Tiles(*(some(x) for x in found.tiles)), known=some(found.known))
    listed, counts = packed_levels(some(code), found, query.shape[0], query.shape[1], size)
    return Problem(
        query if query.stride(-1) == 1 else query.contiguous(),
        *tables_of(some(k), some(v), order, pyramid._replace(span=some(pyramid.span))),
        Compact(*(some(x) for x in queries)),
        Tiles(*(some(x) for x in q_tiles)),
        listed,
        counts,
        some(code),
        1.0,
        query,
        query,
    )


def _specimen(size: int) -> Specimen:
    constants = {**_boxes(size), "CHUNK": _CHUNK, "PER": TURN, "AHEAD": AHEAD}
    names = ("block", "span", "known", "listed", "counts")
    pointers = {**dict.fromkeys(names, "*i32"), "code": "*i8"}
    signature = typed(pack_levels_kernel, constants, **pointers)
    return Specimen(f"pack levels {size}", pack_levels_kernel, signature, constants)


SPECIMENS = [_specimen(64)] if isinstance(pack_levels_kernel, triton.JITFunction) else []
