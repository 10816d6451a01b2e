"""k-means with the distances of the package flash-kmeans, and our means.

Its own loop reads the device to see whether it has converged, and adds up with atomics, in whatever
order they come.
"""

from __future__ import annotations

import torch
from flash_kmeans.assign_euclid_triton import euclid_assign_triton
from torch import Tensor

from dit_accel.kernels.kmeans.clusters import Clusters
from dit_accel.kernels.kmeans.triton import update_means


def kmeans(
    x: Tensor,
    clusters: int,
    iterations: int,
    start: Tensor | None,
    valid: Tensor | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, depth = x.shape
    if valid is not None:
        x = x.masked_fill(~valid[:, None, :, None], 0.0)  # padding may hold anything
    x = x.contiguous()
    state = Clusters(x, clusters, iterations, start, valid, seed)
    state.changed.fill_(1)  # its kernel does not tell
    rows = x.view(batch * heads, length, depth)
    centre = state.centre.view(batch * heads, clusters, depth)
    labels = state.labels.view(batch * heads, length)
    square = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).square_()
    for step in range(iterations + 1):
        if step:
            update_means(x, state, step)
        double = 2 * state.half[:, :, :clusters].reshape(batch * heads, clusters)
        euclid_assign_triton(rows, centre, square, labels, double)
    return state.labels, state.exact
