"""Guards and dispatch of the order by labels."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.backends import implementation, interpreted, resolve

KNOWN = ("auto", "reference", "triton")
MOST = 4095
"""Clusters that the kernel counts at once."""


def label_order(
    labels: Tensor,
    clusters: int,
    *,
    text: tuple[int, int] = (0, 0),
    text_block: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Tokens sorted by label, those of one label in their own order, and behind them the text.

    Args:
        labels: integer ``[B, H, V]``, of the video's tokens, below ``clusters``.
        clusters: ``C``.
        text: where ``T`` tokens without labels begin and end in the sequence of ``V + T``.
        text_block: tokens in a block of these; the last may be shorter.
        backend: ``"auto"``, or one of `KNOWN`; a named one never falls back.

    Returns:
        ``perm`` int64 ``[B, H, V + T]``, and ``offsets`` int32 ``[B, H, C + N + 1]`` into it, of
        the clusters and of the ``N`` blocks of text.

    Raises:
        ValueError: labels are no integers of three dimensions.
    """
    if labels.ndim != 3 or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"labels: expected integers [B, H, V], got {labels.dtype} {list(labels.shape)}"
        )
    chosen = resolve(backend, labels, KNOWN, _refusal(labels, clusters), any_size=True)
    run = implementation("label_order", chosen).label_order
    perm, offsets = run(labels, clusters, text, text_block)
    return perm, offsets


def _refusal(labels: Tensor, clusters: int) -> str | None:
    if clusters > MOST:
        return f"it takes up to {MOST} clusters, not {clusters}"
    if labels.device.type != "cuda" and not interpreted():
        return f"it runs on CUDA devices, not on {labels.device.type}"
    return None
