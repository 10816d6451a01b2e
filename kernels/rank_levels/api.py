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
    codes: Sequence[int] | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """How many bounds an entry is within, when a row is added up from its best entry down.

    Args:
        score: fp32 or fp64 ``[B, H, N, M]``, ranked from the largest; of equal ones the first comes
            first. ``-inf`` is never within a bound. No NaN.
        worth: ``[B, H, N|1, M]``, at least 0, what is added up.
        bounds: ``[B|1, H|1, N|1, K]``.
        inclusive: an entry is within a bound if what is added up with it does not exceed it;
            otherwise if what is added up before it is below it.
        codes: what is written for 0, 1, ... ``K`` bounds, each of 0 to 15; the number itself by
            default.
        out: int8, as ``score``, of any strides but the last, to be filled and returned.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``, which adds in fp32; a named one never
            falls back.

    Returns:
        int8, as ``score``.

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
    elif out.dtype != torch.int8 or out.shape != score.shape or out.stride(3) != 1:
        raise ValueError(
            f"out: expected int8 {list(score.shape)} with a last stride of 1, got {out.dtype} "
            f"{list(out.shape)} of strides {list(out.stride())}"
        )
    refusal = None
    if score.dtype != torch.float32:
        refusal = f"it takes fp32, not {score.dtype}"
    elif width > LONGEST:
        refusal = f"it takes rows of up to {LONGEST} entries, not {width}"
    elif number > MOST:
        refusal = f"it takes up to {MOST} bounds, not {number}"
    elif score.device.type != "cuda" and not interpreted():
        refusal = f"it runs on CUDA devices, not on {score.device.type}"
    known = ("auto", "reference", "triton")
    chosen = resolve(backend, score, known, refusal, any_size=True)
    if out.numel():
        with torch.no_grad():
            run = implementation("rank_levels", chosen).rank_levels
            run(score, worth, bounds, inclusive, codes, out)
    return out
