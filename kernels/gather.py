"""Rows of some heads in another order, for kernels that read runs of rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed

_PLACES = 64
"""Rows that a program brings."""


@triton.jit(do_not_specialize=["heads", "places", "height", "first_pair"])
def _gather(
    x_ptr,
    y_ptr,
    token_ptr,
    x_out,
    y_out,
    zero,
    zeros_64,
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
    first_pair,
    BOTH: tl.constexpr,
    ZERO: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    b, h = (first_pair + pair) // heads, (first_pair + pair) % heads
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    depth = tl.arange(0, D)
    inside = place < places
    token = tl.load(token_ptr + b * token_b + h * token_h + place, mask=inside, other=-1)
    known, token = (token >= 0)[:, None], token.to(tl.int64)[:, None]
    where = (pair * height + place)[:, None] * D + depth[None, :]
    x = tl.load(x_ptr + b * x_b + h * x_h + token * x_l + depth[None, :], mask=known, other=0.0)
    if BOTH:
        y = tl.load(y_ptr + b * y_b + h * y_h + token * y_l + depth[None, :], mask=known, other=0.0)
        tl.store(y_out + where, y, mask=inside[:, None])
    if ZERO and tl.program_id(0) == 0:
        tl.store(zeros_64 + pair, 0)
        if tl.program_id(1) == 0:
            tl.store(zero, 0)
    tl.store(x_out + where, x, mask=inside[:, None])


def gather_rows(x: Tensor, tokens: Tensor, out: Tensor, first_pair: int, pairs: int) -> None:
    """Write ``x[b, h, tokens]`` of some pairs of a batch element and a head; zero for -1.

    Args:
        x: ``[B, H, L, D]``, with a last stride of 1.
        tokens: int32 ``[B|1, H|1, M]``.
        out: ``[P, M or more, D]``, contiguous.
        first_pair: ``b · H + h`` of the first one.
        pairs: how many, at most ``P``.
    """
    pointers = (x, x, tokens, out, out, tokens, tokens)
    _launch(pointers, out.shape[-2], first_pair, pairs, both=False, zero=False)


def gather_both(
    x: Tensor,
    y: Tensor,
    tokens: Tensor,
    x_out: Tensor,
    y_out: Tensor,
    zeros: tuple[Tensor, Tensor] | None = None,
    *,
    first_pair: int = 0,
    pairs: int | None = None,
) -> None:
    """Write the first rows of some heads, ``x[b, h, tokens]`` and ``y[b, h, tokens]``; zero for -1.

    Args:
        x, y: ``[B, H, L, D]``, with a last stride of 1.
        tokens: int32 ``[B|1, H|1, M]``.
        x_out, y_out: ``[..., M or more, D]``, contiguous, of as many heads or more.
        zeros: int32 ``[1]`` and int64 ``[B, H]``, contiguous: what later kernels are to find at 0.
        first_pair: ``b · H + h`` of the first one.
        pairs: how many; all by default.
    """
    pairs = x.shape[0] * x.shape[1] if pairs is None else pairs
    pointers = (x, y, tokens, x_out, y_out, *(zeros or (tokens, tokens)))
    _launch(pointers, x_out.shape[-2], first_pair, pairs, both=True, zero=zeros is not None)


def _launch(
    pointers: tuple[Tensor, ...],
    height: int,
    first_pair: int,
    pairs: int,
    *,
    both: bool,
    zero: bool,
) -> None:
    x, y, tokens = pointers[:3]
    places = tokens.shape[-1]
    launch(
        _gather,
        (-(-places // _PLACES), pairs),
        pointers,
        (
            *(*x.stride()[:3], *y.stride()[:3], *lead_strides(tokens)),
            *(x.shape[1], places, height, first_pair),
        ),
        BOTH=both,
        ZERO=zero,
        D=x.shape[3],
        BN=_PLACES,
        num_warps=4,
    )


def specimen(depth: int, dtype: str, *, both: bool = False, zero: bool | None = None) -> Specimen:
    """The kernel as it is launched; what takes both mostly makes zeros too."""
    zero = both if zero is None else zero
    constants = {"BOTH": both, "ZERO": zero, "D": depth, "BN": _PLACES}
    types = {
        **dict.fromkeys(("x_ptr", "y_ptr", "x_out", "y_out"), f"*{dtype}"),
        **dict.fromkeys(("token_ptr", "zero"), "*i32"),
        "zeros_64": "*i64" if zero else "*i32",
    }
    return Specimen(
        f"gather{' both' * both}{' zeros' * zero} {dtype} D={depth}",
        _gather,
        typed(_gather, constants, **types),
        constants,
        {"num_warps": 4},
        aligned=("x_b", "x_h", "x_l", "y_b", "y_h", "y_l"),
    )
