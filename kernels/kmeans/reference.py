"""k-means in plain torch: all heads at once, a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.kmeans.start import starting_centroids
from dit_accel.kernels.ragged import working_dtype

WORKSPACE_BYTES = 64 * 2**20
"""What the distances of one chunk of tokens may take."""
_PATIENCE = 5
"""On a GPU, where it makes the host wait, convergence is looked for every so many iterations."""


def kmeans(
    x: Tensor,
    clusters: int,
    iterations: int,
    start: Tensor | None,
    valid: Tensor | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, depth = x.shape
    work = working_dtype(x.dtype)
    rows = x.to(work)
    weight = None
    if valid is not None:
        rows = rows.masked_fill(~valid[:, None, :, None], 0.0)  # padding may hold anything
        weight = valid[:, None].expand(batch, heads, length).reshape(-1, length)
    rows = rows.reshape(-1, length, depth)
    if start is None:
        centres = starting_centroids(x, clusters, valid, seed).view(-1, clusters, depth)
    else:
        centres = start.to(work).reshape(-1, clusters, depth)
    labels = _nearest(rows, centres)
    pause = 1 if x.device.type == "cpu" else _PATIENCE
    for i in range(iterations):
        centres = _means(rows, labels, weight, centres)
        new = _nearest(rows, centres)
        if (i + 1) % pause == 0 and torch.equal(new, labels):
            break
        labels = new
    return labels.view(batch, heads, length), centres.view(batch, heads, clusters, depth)


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """int64 ``[BH, L]``: ``argmin |x - c|²`` is ``argmax x·c - ½|c|²``."""
    half = centres.square().sum(-1).mul_(0.5).unsqueeze(1)
    heads, length, _ = rows.shape
    step = max(1, WORKSPACE_BYTES // (heads * centres.shape[1] * rows.element_size()))
    labels = [
        torch.baddbmm(half, rows[:, i : i + step], centres.mT, beta=-1).argmax(-1)
        for i in range(0, length, step)
    ]
    return torch.cat(labels, 1)


def _means(rows: Tensor, labels: Tensor, weight: Tensor | None, centres: Tensor) -> Tensor:
    """Means of the clusters; those without a member stay where they were."""
    heads, clusters, depth = centres.shape
    if rows.device.type == "cpu":
        flat = (labels + torch.arange(heads).view(-1, 1) * clusters).view(-1)
        total = rows.new_zeros(heads * clusters, depth)
        total = total.index_add_(0, flat, rows.reshape(-1, depth)).view(centres.shape)
        ones = rows.new_ones(flat.numel()) if weight is None else weight.reshape(-1).to(rows.dtype)
        count = rows.new_zeros(heads * clusters).index_add_(0, flat, ones).view(heads, clusters, 1)
    else:  # a product of zeros and ones adds up in a fixed order, as atomics do not
        total, count = torch.zeros_like(centres), centres.new_zeros(heads, clusters, 1)
        step = max(1, WORKSPACE_BYTES // (heads * clusters * rows.element_size()))
        ids = torch.arange(clusters, device=rows.device).view(1, -1, 1)
        for i in range(0, rows.shape[1], step):
            some = slice(i, i + step)
            member = ids == labels[:, some].unsqueeze(1)
            if weight is not None:
                member = member & weight[:, some].unsqueeze(1)
            member = member.to(rows.dtype)
            total.baddbmm_(member, rows[:, some])
            count += member.sum(-1, keepdim=True)
    return torch.where(count > 0, total / count.clamp(min=1), centres)
