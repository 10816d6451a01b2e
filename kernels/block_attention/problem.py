"""A call as kernels read it: keys in order, means behind them, and a plan as lists of tiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_attention.pairs import add_pairs
from dit_accel.kernels.cutting import cut_blocks
from dit_accel.kernels.cutting import specimen as specimen_of_cut
from dit_accel.kernels.gather import gather_both, specimen
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
    tiles,
)
from dit_accel.kernels.specimen import Specimen, typed

AHEAD = 16
"""Empty entries after every list: what a kernel may read beyond it."""
_LIST_BYTES = 256 * 2**20
"""What the lists of pooled tiles may take at once."""
_CHUNK = 1024
"""Tiles of a row that are looked at together."""
_ROWS = 64
"""Means that a program makes."""
_BITS = tl.constexpr(START_BIT)
_BLOCK = tl.constexpr(BLOCK_BIT)
_LEVEL = tl.constexpr((1 << BLOCK_BIT) - 1)
_MASK = tl.constexpr((1 << LENGTH_BITS) - 1)
_SHAPE = tl.constexpr((1 << START_BIT) - 1)


@triton.jit(
    do_not_specialize=[
        *("heads", "rows", "columns", "num_tiles"),
        *("code_b", "code_h", "tile_b", "tile_h", "bound_b", "bound_h"),
    ]
)
def pack_kernel(
    code,
    block,
    span,
    bounds,
    listed,
    counts,
    pairs,
    heads,
    rows,
    columns,
    num_tiles,
    code_b,
    code_h,
    tile_b,
    tile_h,
    bound_b,
    bound_h,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The tiles of a row of a plan: those of full length first, each part in rising order."""
    row, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    codes = code + b * code_b + h * code_h + row.to(tl.int64) * columns
    at = b * tile_b + h * tile_h
    place = head.to(tl.int64) * rows + row
    target = listed + place * (num_tiles + AHEAD)
    done = 0
    keys = 0
    for part in tl.static_range(2):
        for first in range(0, num_tiles, CHUNK):
            number = first + tl.arange(0, CHUNK)
            inside = number < num_tiles
            where = tl.load(span + at + number, mask=inside, other=0)
            # of full length, and no means
            plain = (where & _SHAPE) == SIZE
            wanted = plain if part == 0 else (where != 0) & (plain == 0)
            of = tl.load(block + at + number, mask=inside, other=0)
            kind = tl.load(codes + (of >> _BLOCK), mask=inside, other=0)
            chosen = wanted & (kind == (of & _LEVEL))
            rank = tl.cumsum(chosen.to(tl.int32), 0)
            tl.store(target + done + rank - 1, where, mask=chosen)
            done += tl.sum(chosen.to(tl.int32), 0)
            keys += tl.sum(tl.where(chosen & ((of & _LEVEL) == 1), where & _MASK, 0), 0)
        tl.store(counts + place * 2 + part, done)
    # some more, which are read ahead and hold nothing
    tl.store(target + done + tl.arange(0, AHEAD), tl.zeros([AHEAD], tl.int32))
    add_pairs(pairs + head, bounds + b * bound_b + h * bound_h + row, keys)


@triton.jit(do_not_specialize=["heads", "rows", "height", "base", "span_b", "span_h"])
def pool_kernel(
    keys,
    values,
    span,
    heads,
    rows,
    height,
    base,
    span_b,
    span_h,
    MOST: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Means of up to so many rows of both tables, written behind them."""
    head = tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < rows
    where = tl.load(span + b * span_b + h * span_h + place, mask=inside, other=0)
    count = where & _MASK
    depth = tl.arange(0, D)[None, :]
    first = head.to(tl.int64) * height * D
    table = (keys if tl.program_id(2) == 0 else values) + first
    total = tl.zeros([ROWS, D], tl.float32)
    for i in tl.static_range(MOST):
        row = ((where >> _BITS) + i)[:, None] * D + depth
        total += tl.load(table + row, mask=(i < count)[:, None], other=0.0).to(tl.float32)
    mean = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    target = table + (base + place)[:, None] * D + depth
    tl.store(target, mean.to(keys.dtype.element_ty), mask=inside[:, None])


def tiles_of(order: Compact, length: int, size: int, longest: int | None) -> Tiles:
    """Tiles of an order's blocks, remembered."""

    def make() -> Tiles:
        if longest is None:
            return cut_blocks(order.offsets, length, size)[0]
        return tiles(order.offsets, length, size, longest)

    return remembered(order.perm, order.offsets, (size, longest), make)


class Problem(NamedTuple):
    """A call as kernels read it: queries and keys in order, a packed plan, where results go."""

    q: Tensor  # [B, H, L, D], rows of any stride
    keys: Tensor  # [B, H, L or more, D], contiguous, in order, means behind them
    values: Tensor
    table: Tensor  # [2 * B * H * (L or more), D], the rows of both, keys first
    taken: Tensor  # int32 [1], 0: tiles that programs have taken beyond their first
    queries: Compact
    q_tiles: Tiles
    listed: Tensor  # int32 [B, H, Nq, T + 2], the exact tiles of every row
    counts: Tensor  # int32 [B, H, Nq, 2], tiles of full length, and all
    pairs: Tensor  # int64 [B, H], of a query and a key that are exact
    code: Tensor
    scale: float
    out: Tensor  # [B, H, L, D], contiguous
    lse: Tensor  # [B, H, L]

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of queries, and heads."""
        return self.q_tiles.span.shape[-1], self.q.shape[0] * self.q.shape[1]


def packed(
    code: Tensor, k_tiles: Tiles, q_offsets: Tensor, pairs: Tensor, heads: int, size: int
) -> tuple[Tensor, Tensor]:
    """Every row's exact tiles as a list, ``[B, H, Nq, T + 2]``, and how many, ``[B, H, Nq, 2]``.

    Their pairs are added to ``pairs``, int64 ``[B, H]``.
    """
    batch = pairs.numel() // heads
    rows, columns = code.shape[2:]
    num_tiles = k_tiles.span.shape[-1]
    listed, counts = (
        torch.empty((batch, heads, rows, n), dtype=torch.int32, device=code.device)
        for n in (num_tiles + AHEAD, 2)
    )
    launch(
        pack_kernel,
        (rows, batch * heads),
        (code, k_tiles.block, k_tiles.span, q_offsets, listed, counts, pairs),
        (
            *(heads, rows, columns, num_tiles, *lead_strides(code)),
            *(*lead_strides(k_tiles.span), *lead_strides(q_offsets)),
        ),
        SIZE=size,
        CHUNK=_CHUNK,
        AHEAD=AHEAD,
    )
    return listed, counts


def tables_of(
    k: Tensor, v: Tensor, order: Compact, pyramid: Pooled | None, pairs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values in the order, and behind them the means of every level; as `Problem` has
    them, with the rows of both, and a 0. ``pairs`` is 0 after that."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, heads, length, depth = k.shape
    height = length if pyramid is None else pyramid.height
    table = torch.empty((2, batch, heads, height, depth), dtype=k.dtype, device=k.device)
    taken = torch.empty(1, dtype=torch.int32, device=k.device)
    keys, values = table.unbind()
    gather_both(k, v, order.perm, keys, values, (taken, pairs))
    if pyramid is not None:
        rows = pyramid.span.shape[-1]
        launch(
            pool_kernel,
            (-(-rows // _ROWS), batch * heads, 2),
            (keys, values, pyramid.span),
            (heads, rows, height, length, *lead_strides(pyramid.span)),
            MOST=max(pyramid.widths),
            D=depth,
            ROWS=_ROWS,
            num_warps=4,
        )
    return keys, values, table.view(-1, depth), taken


def some_of(x: Tensor, batch: slice, heads: slice) -> Tensor:
    """Some heads of ``[B|1, H|1, ...]``."""
    x = x[batch] if x.shape[0] > 1 else x
    return x[:, heads] if x.shape[1] > 1 else x


def pooled_parts(problem: Problem, pyramid: Pooled, size: int) -> Iterator[Problem]:
    """The pooled tiles of a problem, some heads at a time: their lists are long."""
    batch, heads, rows, _ = problem.counts.shape
    each = rows * (pyramid.tiles.span.shape[-1] + AHEAD) * 4
    step = max(1, _LIST_BYTES // each)
    for b in range(batch):
        for h in range(0, heads, step):
            cut = partial(some_of, batch=slice(b, b + 1), heads=slice(h, h + step))
            q, code = cut(problem.q), cut(problem.code).contiguous()
            found = Tiles(*(cut(x) for x in pyramid.tiles))
            queries, pairs = Compact(*(cut(x) for x in problem.queries)), cut(problem.pairs)
            listed, counts = packed(code, found, queries.offsets, pairs, q.shape[1], size)
            yield problem._replace(
                q=q,
                keys=cut(problem.keys),
                values=cut(problem.values),
                queries=queries,
                q_tiles=Tiles(*(cut(x) for x in problem.q_tiles)),
                listed=listed,
                counts=counts,
                pairs=pairs,
                code=code,
                out=cut(problem.out),
                lse=cut(problem.lse),
            )


def _specimens() -> list[Specimen]:
    pack = {"SIZE": 64, "CHUNK": _CHUNK, "AHEAD": AHEAD}
    ints = ("block", "span", "bounds", "listed", "counts")
    pointers = {**dict.fromkeys(ints, "*i32"), "code": "*i8", "pairs": "*i64"}
    pool = {"MOST": 8, "D": 128, "ROWS": _ROWS}
    return [
        Specimen("pack", pack_kernel, typed(pack_kernel, pack, **pointers), pack),
        Specimen(
            "pool bf16 D128",
            pool_kernel,
            typed(pool_kernel, pool, keys="*bf16", values="*bf16", span="*i32"),
            pool,
        ),
        specimen(128, "bf16", both=True),
    ]


SPECIMENS = (
    [*_specimens(), specimen_of_cut()] if isinstance(pack_kernel, triton.JITFunction) else []
)
