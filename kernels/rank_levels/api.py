"""Guards and dispatch of levels by rank."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.backends import implementation, interpreted, resolve

LONGEST = 4096
"""Entries of a row that the kernel holds at once."""


def rank_levels(
    score: Tensor, worth: Tensor, bounds: Tensor, *, inclusive: bool = False, backend: str = "auto"
) -> Tensor:
    """How many bounds an entry is within, when a row is added up from its best entry down.

    Args:
        score: fp32 or fp64 ``[B, H, N, M]``, ranked from the largest; of equal ones the first comes
            first. ``-inf`` is never within a bound. No NaN.
        worth: ``[B, H, N|1, M]``, at least 0, what is added up.
        bounds: ``[B|1, H|1, N|1, K]``.
        inclusive: an entry is within a bound if what is added up with it does not exceed it;
            otherwise if what is added up before it is below it.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``, which adds in fp32; a named one never
            falls back.

    Returns:
        int8, as ``score``, 0 to ``K``.

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
    refusal = None
    if score.dtype != torch.float32:
        refusal = f"it takes fp32, not {score.dtype}"
    elif width > LONGEST:
        refusal = f"it takes rows of up to {LONGEST} entries, not {width}"
    elif score.device.type != "cuda" and not interpreted():
        refusal = f"it runs on CUDA devices, not on {score.device.type}"
    known = ("auto", "reference", "triton")
    chosen = resolve(backend, score, known, refusal, any_size=True)
    with torch.no_grad():
        run = implementation("rank_levels", chosen).rank_levels
        levels: Tensor = run(score, worth, bounds, inclusive)
    return levels
