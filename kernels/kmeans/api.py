"""Guards and dispatch of k-means."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from dit_accel.kernels.backends import implementation, resolve, triton_refusal
from dit_accel.kernels.block_summary.api import check_valid

BACKENDS = ("auto", "reference", "triton", "flash_kmeans")
"""``flash_kmeans`` takes the distances of the package of this name; the means are ours."""


def kmeans(
    x: Tensor,
    clusters: int,
    *,
    iterations: int,
    start: Tensor | None = None,
    valid: Tensor | None = None,
    seed: int = 0,
    backend: str = "auto",
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
        backend: ``"auto"``, or a name from `BACKENDS`; a named one never falls back.

    Returns:
        Labels, int32 or int64 ``[B, H, L]``, and the centroids they belong to, fp32
        ``[B, H, C, D]`` (fp64 for fp64 inputs). The labels are those of the nearest centroids; on a
        GPU, where the products are those of ``x``'s dtype, of the nearest once they are rounded.

    Raises:
        ValueError: what was given does not fit.
    """
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
    refusal = triton_refusal(x)
    if refusal is None and x.shape[0] * x.shape[1] * clusters >= 2**31:
        refusal = "it counts the clusters of all heads in 32 bits"
    chosen = resolve(backend, x, BACKENDS, refusal)
    if chosen == "flash_kmeans" and (why := _flash_refusal(x)) is not None:
        raise ValueError(f"backend: expected one that can run here, got 'flash_kmeans': {why}")
    with torch.no_grad():
        run = implementation("kmeans", chosen).kmeans
        found: tuple[Tensor, Tensor] = run(x, clusters, iterations, start, valid, seed)
    return found


def _flash_refusal(x: Tensor) -> str | None:
    """Why flash-kmeans cannot take a tensor; ``None`` when it can."""
    if importlib.util.find_spec("flash_kmeans") is None:
        return "it is not installed: pip install dit-accel[kmeans]"
    if x.device.type != "cuda":
        return f"it runs on CUDA devices, not on {x.device.type}"
    return triton_refusal(x)
