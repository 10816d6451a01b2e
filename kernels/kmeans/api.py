"""Guards and dispatch of k-means."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_summary.api import check_valid


def kmeans(
    x: Tensor,
    clusters: int,
    *,
    iterations: int,
    start: Tensor | None = None,
    valid: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means, each batch element and head by itself.

    Deterministic on one device. An empty cluster keeps its centroid.

    Args:
        x: ``[B, H, L, D]``, floating.
        clusters: ``C``, at least 1 and at most ``L``.
        iterations: at most so many; fewer once nothing changes.
        start: centroids to start from, ``[B, H, C, D]``; by default ``C`` tokens, drawn alike for
            every batch element and head.
        valid: bool ``[B, L]``; tokens that count. The others get a cluster all the same.
        seed: of the tokens to start from.

    Returns:
        Labels int64 ``[B, H, L]``, and the centroids they belong to, fp32 ``[B, H, C, D]`` (fp64
        for fp64 inputs). The labels are those of the nearest centroids.

    Raises:
        ValueError: what was given does not fit.
    """
    from dit_accel.kernels.kmeans import reference

    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floating [B, H, L, D], got {x.dtype} {list(x.shape)}")
    if not 1 <= clusters <= x.shape[2]:
        raise ValueError(f"clusters: expected 1 to {x.shape[2]}, got {clusters}")
    if iterations < 0:
        raise ValueError(f"iterations: expected 0 or more, got {iterations}")
    expected = (*x.shape[:2], clusters, x.shape[3])
    if start is not None and tuple(start.shape) != expected:
        raise ValueError(f"start: expected {list(expected)}, got {list(start.shape)}")
    check_valid(valid, x)
    with torch.no_grad():
        return reference.kmeans(x, clusters, iterations, start, valid, seed)
