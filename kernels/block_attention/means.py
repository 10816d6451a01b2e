"""Keys and values in their order, and behind them the means of every pooled level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_attention.problem import AHEAD
from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import Compact
from dit_accel.kernels.specimen import Specimen, typed

LEVELS = (1, 2, 4, 8)
TURN = 128
"""Rows that the kernel of attention takes at once."""
_SMALLEST = 8
_GROUPS = 8
"""Runs of 8 keys that a program pools at once."""


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
    zeros_64,
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
    if j == 0:
        tl.store(zeros_64 + head, 0)
        if head == 0:
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
    k: Tensor, v: Tensor, order: Compact, found: Rows, pairs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values in the order, and behind them the means of every level.

    Args:
        k, v: ``[B, H, L, D]``.
        order: of the keys.
        found: where its blocks stand.
        pairs: int64 ``[B, H]``, numbers that a later kernel is to find at 0.

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
        (k, v, order.perm, found.first, keys, values, taken, pairs),
        (
            *(*k.stride()[:3], *v.stride()[:3], heads, blocks, found.height),
            *(*lead_strides(order.perm), *lead_strides(found.first)),
        ),
        **_table_constants(depth),
    )
    return keys, values, table.view(-1, depth), taken


def _table_constants(depth: int) -> dict[str, int]:
    return {"D": depth, "GROUPS": _GROUPS, "num_warps": max(1, _GROUPS * depth // 256)}


def _specimens() -> Iterator[Specimen]:
    ints = {**dict.fromkeys(("first", "perm", "zero"), "*i32"), "zeros_64": "*i64"}
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


SPECIMENS = list(_specimens()) if isinstance(levels_kernel, triton.JITFunction) else []
