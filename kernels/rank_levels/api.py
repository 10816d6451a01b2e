"""Guards and dispatch of levels by rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.kernels.backends import implementation, interpreted, resolve

LONGEST = 4096
"""Entries of a row that the kernel holds at once."""
MOST = 7
"""Bounds that the kernel tells apart."""


def rank_levels(
    score: Tensor,
    worth: Tensor,
    bounds: Tensor,
    *,
    inclusive: bool = False,
    shares: bool = False,
    codes: Sequence[int] | None = None,
    out: Tensor | None = None,
    beyond: int = 0,
    backend: str = "auto",
) -> Tensor:
    """How many bounds an entry is within, when a row is added up from its best entry down.

    Args:
        score: fp32 or fp64 ``[B, H, N, M]``, ranked from the largest; of equal ones the first comes
            first. ``-inf`` is never within a bound. No NaN.
        worth: ``[B|1, H|1, N|1, M]``, at least 0, what is added up; of bool, each is worth 1 or
            nothing.
        bounds: ``[B|1, H|1, N|1, K]``.
        inclusive: an entry is within a bound if what is added up with it does not exceed it;
            otherwise if what is added up before it is below it.
        shares: bounds are shares of what a row's entries are worth together.
        codes: what is written for 0, 1, ... ``K`` bounds, each of 0 to 15; the number itself by
            default.
        out: int8 ``[B, H, N or more, M or more]``, of any strides but the last, to be filled and
            returned.
        beyond: what is written where ``out`` is larger than ``score``.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``, which adds in fp32; a named one never
            falls back.

    Returns:
        int8, as ``score``, or ``out``.

    Raises:
        ValueError: what was given does not fit.
    """
    batch, heads, rows, width = score.shape
    for name, tensor, last in (("worth", worth, width), ("bounds", bounds, bounds.shape[-1])):
        fits = tensor.ndim == 4 and tensor.shape[3] == last
        if not fits or any(
            a not in (1, b) for a, b in zip(tensor.shape[:3], (batch, heads, rows), strict=True)
        ):
            raise ValueError(
                f"{name}: expected [{batch}|1, {heads}|1, {rows}|1, {last}], got "
                f"{list(tensor.shape)}"
            )
    number = bounds.shape[-1]
    codes = range(number + 1) if codes is None else codes
    if len(codes) != number + 1 or not all(0 <= code <= 15 for code in codes):
        raise ValueError(f"codes: expected {number + 1} of 0 to 15, got {list(codes)}")
    if out is None:
        out = torch.empty(score.shape, dtype=torch.int8, device=score.device)
    elif (
        out.dtype != torch.int8
        or out.shape[:2] != score.shape[:2]
        or any(a < b for a, b in zip(out.shape[2:], (rows, width), strict=True))
        or out.stride(3) != 1
    ):
        raise ValueError(
            f"out: expected int8 [{batch}, {heads}, {rows} or more, {width} or more] with a last "
            f"stride of 1, got {out.dtype} {list(out.shape)} of strides {list(out.stride())}"
        )
    known = ("auto", "reference", "triton")
    chosen = resolve(backend, score, known, _refusal(score, out, number), any_size=True)
    if out.numel():
        with torch.no_grad():
            run = implementation("rank_levels", chosen).rank_levels
            run(score, worth, bounds, inclusive, shares, codes, out, beyond)
    return out


def _refusal(score: Tensor, out: Tensor, number: int) -> str | None:
    """Why the kernel cannot take a call."""
    if score.dtype != torch.float32:
        return f"it takes fp32, not {score.dtype}"
    if out.shape[3] > LONGEST:
        return f"it takes rows of up to {LONGEST} entries, not {out.shape[3]}"
    if number > MOST:
        return f"it takes up to {MOST} bounds, not {number}"
    if score.device.type != "cuda" and not interpreted():
        return f"it runs on CUDA devices, not on {score.device.type}"
    return None
