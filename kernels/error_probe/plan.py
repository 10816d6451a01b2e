"""The choice under a budget as a kernel, of sums and peaks as the probe leaves them."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed

_LEAST = tl.constexpr(0x007FFFFF)
"""What stands for -inf among the numbers that floats are ordered by."""


@triton.jit(
    do_not_specialize=[
        *("heads", "all_rows", "blocks", "rows", "columns", "density_bits"),
        *("bound_b", "bound_h"),
    ]
)
def choose_kernel(
    total,
    peak,
    bounds,
    code,
    heads,
    all_rows,
    blocks,
    rows,
    columns,
    density_bits: tl.int64,
    bound_b,
    bound_h,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    bounds += head // heads * bound_b + head % heads * bound_h + column
    start = tl.load(bounds, mask=column < columns, other=0)
    keys = tl.load(bounds + 1, mask=column < columns, other=0) - start
    # a block without keys was never written to
    some = (row < rows)[:, None] & (keys > 0)[None, :]
    at = head * columns * rows + column[None, :].to(tl.int64) * rows + row[:, None]
    top = tl.load(peak + at, mask=some, other=float("-inf"))
    error = tl.load(total + at, mask=some, other=0.0)
    highest = tl.max(top, 1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    error *= tl.exp2(top - highest[:, None])
    worth = tl.where(some, keys[None, :], 0)
    ratio = tl.where(some, error / tl.maximum(keys, 1).to(tl.float32)[None, :], float("-inf"))
    every = tl.sum(keys, 0).to(tl.float64)
    budget = tl.floor(every * density_bits.to(tl.float64, bitcast=True)).to(tl.int32)
    # floats in their own order as unsigned numbers; zeros of both signs are equal
    bits = (ratio + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (key.to(tl.int64) + 2147483648).to(tl.uint32)
    # the largest number above which there is too much
    one, beyond = tl.full([1], 1, tl.uint32), tl.zeros([ROWS], tl.uint32)
    for step in range(32):  # unrolled it takes seconds to compile
        more = beyond | (one << (31 - step))
        above = tl.sum(tl.where(key > more[:, None], worth, 0), 1)
        beyond = tl.where(above <= budget, beyond, more)
    # what equals the next number is within as long as there is room, in order
    least = tl.maximum(beyond, _LEAST)
    within = key > least[:, None]
    edge = within & (key - 1 == beyond[:, None])
    reach = tl.sum(tl.where(within & (edge == 0), worth, 0), 1)[:, None]
    reach += tl.cumsum(tl.where(edge, worth, 0), 1)
    chosen = within & ((edge == 0) | (reach <= budget))
    # one at least: the best, the first of equals
    best = tl.argmax(ratio, 1)
    chosen = chosen | (some & (column[None, :] == best[:, None]))
    exact = chosen | (row >= rows)[:, None] | (column >= columns)[None, :]
    inside = (row < all_rows)[:, None] & (column < blocks)[None, :]
    where = (head * all_rows + row)[:, None] * blocks + column[None, :]
    tl.store(code + where, tl.where(exact, 1, -1).to(tl.int8), mask=inside)


def choose(
    total: Tensor, peak: Tensor, bounds: Tensor, density: float, all_rows: int, blocks: int
) -> Tensor:
    """A plan: in every row blocks by falling error a key while their keys fit the budget.

    Args:
        total, peak: fp32 ``[B, H, M, N]``, contiguous; ``total · 2**peak`` is the error of the key
            block in the row. Nothing is read where a block has no key.
        bounds: int32 ``[B|1, H|1, M + 1]`` or longer, where the valid keys of the blocks lie.
        density: share of the keys of these ``M`` blocks that a row may take, at least one block.
        all_rows, blocks: of the plan; beyond ``N`` and ``M`` all is exact.

    Returns:
        int8 ``[B, H, all_rows, blocks]``: 1 exact, -1 left to the rest.
    """
    batch, heads, columns, rows = total.shape
    code = torch.empty((batch, heads, all_rows, blocks), dtype=torch.int8, device=total.device)
    wide = max(16, triton.next_power_of_2(blocks))
    each = _rows(wide)
    launch(
        choose_kernel,
        (-(-all_rows // each), batch * heads),
        (total, peak, bounds, code),
        (
            *(heads, all_rows, blocks, rows, columns),
            struct.unpack("<q", struct.pack("<d", density))[0],
            *lead_strides(bounds),
        ),
        ROWS=each,
        COLUMNS=wide,
        num_warps=_warps(wide),
    )
    return code


def _rows(columns: int) -> int:
    return 4 if columns <= 2048 else 2


def _warps(columns: int) -> int:
    return 4 if columns <= 1024 else 8


def specimen(columns: int) -> Specimen:
    """The kernel as it is launched."""
    constants = {"ROWS": _rows(columns), "COLUMNS": columns}
    types = {
        **dict.fromkeys(("total", "peak"), "*fp32"),
        **{"bounds": "*i32", "code": "*i8", "density_bits": "i64"},
    }
    signature = typed(choose_kernel, constants, **types)
    options = {"num_warps": _warps(columns)}
    return Specimen(f"choice of {columns}", choose_kernel, signature, constants, options)
