"""Guards and dispatch of the choice of the largest entries."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.backends import interpreted, resolve

KNOWN = ("auto", "reference", "triton")
LONGEST = 16384
"""Entries of a row that the kernel holds at once."""


def topk_mask(score: Tensor, wanted: Tensor, *, backend: str = "auto") -> Tensor:
    """Mark the largest entries of every row; of equal ones, the first.

    Args:
        score: fp32 or fp64 ``[B, H, N, M]``; ``-inf`` is never marked. No NaN.
        wanted: integer ``[B, H]``, how many of each row of a head.
        backend: ``"auto"``, or one of `KNOWN`; a named one never falls back.

    Returns:
        bool, as ``score``.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    from dit_accel.kernels.topk import reference

    if score.ndim != 4 or not score.is_floating_point():
        raise ValueError(f"score: expected [B, H, N, M], got {score.dtype} {list(score.shape)}")
    if tuple(wanted.shape) != tuple(score.shape[:2]) or wanted.is_floating_point():
        raise ValueError(
            f"wanted: expected integers {list(score.shape[:2])}, got {wanted.dtype} "
            f"{list(wanted.shape)}"
        )
    if resolve(backend, score, KNOWN, _refusal(score), any_size=True) == "triton":
        from dit_accel.kernels.topk import triton

        return triton.topk_mask(score, wanted)
    return reference.topk_mask(score, wanted)


def _refusal(score: Tensor) -> str | None:
    if score.dtype != torch.float32:
        return f"it takes fp32, not {score.dtype}"
    if score.shape[-1] > LONGEST:
        return f"it takes rows of up to {LONGEST} entries, not {score.shape[-1]}"
    if score.device.type != "cuda" and not interpreted():
        return f"it runs on CUDA devices, not on {score.device.type}"
    return None
