"""Guards and dispatch of the plan by pooled scores."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.backends import implementation, interpreted, resolve

KNOWN = ("auto", "reference", "triton")
MOST = 8192
"""Key blocks of a row that the kernel holds at once."""


def pooled_topk(
    q_mean: Tensor,
    k_mean: Tensor,
    count: Tensor,
    norm: Tensor | None,
    *,
    rows: int,
    columns: int,
    scale: float,
    density: float,
    backend: str = "auto",
) -> Tensor:
    """The ``max(1, ⌊density · n⌋)`` best key blocks of every row, ``n`` of which have any key.

    ``score_ij = scale · q̄_i·k̄_j``, and ``+ log(‖C_j‖ + 1e-5)`` with norms (PISA, arXiv 2602.01077).
    A block without keys is never chosen; of equal scores the first is.

    Args:
        q_mean, k_mean: fp32 or fp64 ``[B, H, Nq, D]``, ``[B, H, Nk, D]``.
        count: integer ``[B|1, H|1, Nk]``, valid keys of a block.
        norm: ``‖C_j‖``, ``[B, H, Nk]`` in that dtype, or ``None``.
        rows, columns: blocks that are chosen for and from, the first ones; all others are exact.
        scale: of the logits.
        density: above 0, at most 1.
        backend: ``"auto"``, or one of `KNOWN`; a named one never falls back.

    Returns:
        int8 ``[B, H, Nq, Nk]``: 1 exact, -1 left to the rest.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if q_mean.ndim != 4 or k_mean.ndim != 4 or q_mean.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"q_mean, k_mean: expected fp32 or fp64 [B, H, N, D], got {q_mean.dtype} "
            f"{list(q_mean.shape)} and {list(k_mean.shape)}"
        )
    batch, heads, blocks, _ = k_mean.shape
    for name, x, leads in (("count", count, ((1, batch), (1, heads))),
                           ("norm", norm, ((batch,), (heads,)))):  # fmt: skip
        if x is not None and (
            x.ndim != 3 or x.shape[0] not in leads[0] or x.shape[1] not in leads[1]
            or x.shape[2] != blocks
        ):  # fmt: skip
            raise ValueError(f"{name}: expected [{batch}, {heads}, {blocks}], got {list(x.shape)}")
    if not (0 <= rows <= q_mean.shape[2] and 0 <= columns <= blocks):
        raise ValueError(
            f"rows, columns: expected at most {q_mean.shape[2]} and {blocks}, got {rows}, {columns}"
        )
    chosen = resolve(backend, q_mean, KNOWN, _refusal(q_mean, blocks), any_size=True)
    run = implementation("pooled_topk", chosen).pooled_topk
    found: Tensor = run(q_mean, k_mean, count, norm, rows, columns, scale, density)
    return found


def share_of(available: Tensor, density: float) -> Tensor:
    """int64 ``max(1, ⌊density · n⌋)``, in fp64."""
    return (available.double() * density).floor().clamp(min=1).long()


def _refusal(q_mean: Tensor, blocks: int) -> str | None:
    if q_mean.dtype != torch.float32:
        return f"it takes fp32, not {q_mean.dtype}"
    depth = q_mean.shape[-1]
    if depth not in (16, 32, 64, 128):
        return f"it takes head sizes 16, 32, 64 and 128, not {depth}"
    if blocks > MOST:
        return f"it takes up to {MOST} key blocks, not {blocks}"
    if q_mean.device.type != "cuda" and not interpreted():
        return f"it runs on CUDA devices, not on {q_mean.device.type}"
    return None
