"""A plan over blocks of any length as lists of boxes: neighbours that are both exact make one run.

Only the last box of a run can be short, so the fewer runs, the less is padded.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_attention.pairs import add_pairs
from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import START_BIT
from dit_accel.kernels.scan import larger
from dit_accel.kernels.specimen import Specimen, typed

_CHUNK = 1024
"""Blocks of a row that are looked at together."""
_BITS = tl.constexpr(START_BIT)


@triton.jit
def _exact(codes, offsets, column, columns):
    """Which blocks of a row are exact and hold something, where they begin and end."""
    inside = (column >= 0) & (column < columns)
    start = tl.load(offsets + column, mask=inside, other=0)
    stop = tl.load(offsets + column + 1, mask=inside, other=0)
    kind = tl.load(codes + column, mask=inside, other=0)
    return (kind == 1) & (stop > start), start, stop


@triton.jit(
    do_not_specialize=[
        *("heads", "rows", "columns", "width"),
        *("code_b", "code_h", "off_b", "off_h", "bound_b", "bound_h"),
    ]
)
def pack_runs_kernel(
    code,
    offsets,
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
    off_b,
    off_h,
    bound_b,
    bound_h,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The boxes of a row of a plan: the full ones first, each part in rising order."""
    row, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    codes = code + b * code_b + h * code_h + row.to(tl.int64) * columns
    offsets += b * off_b + h * off_h
    place = head.to(tl.int64) * rows + row
    target = listed + place * width
    done = 0
    keys = 0
    for part in tl.static_range(2):
        # where the run that goes on from the chunk before began
        open_run = -1
        for first in range(0, columns, CHUNK):
            column = first + tl.arange(0, CHUNK)
            chosen, start, stop = _exact(codes, offsets, column, columns)
            before, _, _ = _exact(codes, offsets, column - 1, columns)
            after, _, _ = _exact(codes, offsets, column + 1, columns)
            opens = tl.where(chosen & (before == 0), start, -1)
            run = tl.maximum(tl.associative_scan(opens, 0, larger), open_run)
            open_run = tl.max(run, 0)
            boxes = tl.where(chosen, (stop - run) // SIZE, 0)
            if part == 0:
                keys += tl.sum(tl.where(chosen, stop - start, 0), 0)
                # of the run's boxes those that end in this block
                earlier = tl.where(chosen, (start - run) // SIZE, 0)
                number = boxes - earlier
                rank = tl.cumsum(number, 0) - number
                for i in range(0, tl.max(number, 0)):
                    where = ((run + (earlier + i) * SIZE) << _BITS) | SIZE
                    tl.store(target + done + rank + i, where, mask=i < number)
                done += tl.sum(number, 0)
            else:
                left = stop - run - boxes * SIZE
                short = chosen & (after == 0) & (left > 0)
                rank = tl.cumsum(short.to(tl.int32), 0) - 1
                where = ((run + boxes * SIZE) << _BITS) | left
                tl.store(target + done + rank, where, mask=short)
                done += tl.sum(short.to(tl.int32), 0)
        tl.store(counts + place * 2 + part, done)
    # some more, which are read ahead and hold nothing
    tl.store(target + done + tl.arange(0, AHEAD), tl.zeros([AHEAD], tl.int32))
    add_pairs(pairs + head, bounds + b * bound_b + h * bound_h + row, keys)


def packed_runs(
    code: Tensor,
    offsets: Tensor,
    q_offsets: Tensor,
    pairs: Tensor,
    heads: int,
    length: int,
    size: int,
    ahead: int,
) -> tuple[Tensor, Tensor]:
    """Every row's exact boxes as a list, ``[B, H, Nq, T + ahead]``, and how many.

    Args:
        code: int8 ``[B|1, H|1, Nq, Nk]``, contiguous.
        offsets: int32 ``[B|1, H|1, Nk + 1]``, contiguous: blocks that follow each other.
        q_offsets: int32 ``[B|1, H|1, Nq + 1]``, contiguous: the queries of every row.
        pairs: int64 ``[B, H]``, to which the exact pairs are added.
        heads: of the lists.
        length: keys in all.
        size: of a box, below ``2 ** LENGTH_BITS``.
        ahead: empty entries after every list; a power of two.

    Returns:
        The lists, and ``[B, H, Nq, 2]``, boxes of full length, and all.
    """
    batch = pairs.numel() // heads
    rows, columns = code.shape[2:]
    width = length // size + columns + ahead
    listed = code.new_empty((batch, heads, rows, width), dtype=offsets.dtype)
    counts = code.new_empty((batch, heads, rows, 2), dtype=offsets.dtype)
    launch(
        pack_runs_kernel,
        (rows, batch * heads),
        (code, offsets, q_offsets, listed, counts, pairs),
        (
            *(heads, rows, columns, width, *lead_strides(code)),
            *(*lead_strides(offsets), *lead_strides(q_offsets)),
        ),
        SIZE=size,
        CHUNK=_CHUNK,
        AHEAD=ahead,
    )
    return listed, counts


def _specimens() -> list[Specimen]:
    constants = {"SIZE": 16, "CHUNK": _CHUNK, "AHEAD": 16}
    ints = ("offsets", "bounds", "listed", "counts")
    pointers = {**dict.fromkeys(ints, "*i32"), "code": "*i8", "pairs": "*i64"}
    signature = typed(pack_runs_kernel, constants, **pointers)
    return [Specimen("pack runs", pack_runs_kernel, signature, constants)]


SPECIMENS = _specimens() if isinstance(pack_runs_kernel, triton.JITFunction) else []
