"""Rows of some heads in another order, for kernels that read runs of rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed


@triton.jit(do_not_specialize=["heads", "places", "height", "first_pair"])
def _gather(
    x_ptr,
    token_ptr,
    out_ptr,
    x_b,
    x_h,
    x_l,
    token_b,
    token_h,
    heads,
    places,
    height,
    first_pair,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    b, h = (first_pair + pair) // heads, (first_pair + pair) % heads
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    depth = tl.arange(0, D)
    inside = place < places
    token = tl.load(token_ptr + b * token_b + h * token_h + place, mask=inside, other=-1)
    row = tl.load(
        x_ptr + b * x_b + h * x_h + token.to(tl.int64)[:, None] * x_l + depth[None, :],
        mask=(token >= 0)[:, None],
        other=0.0,
    )
    where = (pair * height + place)[:, None] * D + depth[None, :]
    tl.store(out_ptr + where, row, mask=inside[:, None])


def gather_rows(x: Tensor, tokens: Tensor, out: Tensor, first_pair: int, pairs: int) -> None:
    """Write ``x[b, h, tokens]`` of some pairs of a batch element and a head; zero for -1.

    Args:
        x: ``[B, H, L, D]``, with a last stride of 1.
        tokens: int32 ``[B|1, H|1, M]``.
        out: ``[P, M or more, D]``, contiguous.
        first_pair: ``b · H + h`` of the first one.
        pairs: how many, at most ``P``.
    """
    places = tokens.shape[-1]
    block = 64
    launch(
        _gather,
        (-(-places // block), pairs),
        (x, tokens, out),
        (
            *(*x.stride()[:3], *lead_strides(tokens)),
            *(x.shape[1], places, out.shape[-2], first_pair),
        ),
        D=x.shape[3],
        BN=block,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["heads", "places", "height"])
def _gather_both(
    x_ptr,
    y_ptr,
    token_ptr,
    x_out,
    y_out,
    x_b,
    x_h,
    x_l,
    y_b,
    y_h,
    y_l,
    token_b,
    token_h,
    heads,
    places,
    height,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    depth = tl.arange(0, D)
    inside = place < places
    token = tl.load(token_ptr + b * token_b + h * token_h + place, mask=inside, other=-1)
    known, token = (token >= 0)[:, None], token.to(tl.int64)[:, None]
    where = (pair * height + place)[:, None] * D + depth[None, :]
    x = tl.load(x_ptr + b * x_b + h * x_h + token * x_l + depth[None, :], mask=known, other=0.0)
    y = tl.load(y_ptr + b * y_b + h * y_h + token * y_l + depth[None, :], mask=known, other=0.0)
    tl.store(x_out + where, x, mask=inside[:, None])
    tl.store(y_out + where, y, mask=inside[:, None])


def gather_both(x: Tensor, y: Tensor, tokens: Tensor, x_out: Tensor, y_out: Tensor) -> None:
    """Write the first rows of every head, ``x[b, h, tokens]`` and ``y[b, h, tokens]``; zero for -1.

    Args:
        x, y: ``[B, H, L, D]``, with a last stride of 1.
        tokens: int32 ``[B|1, H|1, M]``.
        x_out, y_out: ``[B, H, M or more, D]``, contiguous.
    """
    batch, heads, _, depth = x.shape
    places = tokens.shape[-1]
    block = 64
    launch(
        _gather_both,
        (-(-places // block), batch * heads),
        (x, y, tokens, x_out, y_out),
        (
            *(*x.stride()[:3], *y.stride()[:3], *lead_strides(tokens)),
            *(heads, places, x_out.shape[2]),
        ),
        D=depth,
        BN=block,
        num_warps=4,
    )


def specimen(depth: int, dtype: str) -> Specimen:
    """The kernel as it is launched."""
    constants = {"D": depth, "BN": 64}
    types = {"x_ptr": f"*{dtype}", "token_ptr": "*i32", "out_ptr": f"*{dtype}"}
    return Specimen(
        f"gather {dtype} D={depth}",
        _gather,
        typed(_gather, constants, **types),
        constants,
        {"num_warps": 4},
        aligned=("x_b", "x_h", "x_l"),
    )


def specimen_of_both(depth: int, dtype: str) -> Specimen:
    """The kernel of two tensors as it is launched."""
    constants = {"D": depth, "BN": 64}
    types = {
        **dict.fromkeys(("x_ptr", "y_ptr", "x_out", "y_out"), f"*{dtype}"),
        "token_ptr": "*i32",
    }
    return Specimen(
        f"gather both {dtype} D={depth}",
        _gather_both,
        typed(_gather_both, constants, **types),
        constants,
        {"num_warps": 4},
        aligned=("x_b", "x_h", "x_l", "y_b", "y_h", "y_l"),
    )
