"""An order of centroids in which neighbours are alike, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 6
"""Of the power iteration: a direction of large spread is enough."""


def bisected(centroids: Tensor) -> Tensor:
    """Centroids halved along the direction of their largest spread, and the halves in turn.

    Each half turns its direction so that it goes on where the half before it ends. Blocks that a
    plan takes together mostly stand together then, and a run of them is read as one.

    Args:
        centroids: ``[B, H, C, D]``, finite.

    Returns:
        int64 ``[B, H, C]``: which centroid stands at each place.
    """
    batch, heads, count, depth = centroids.shape
    groups = batch * heads
    width = 1 << max(0, count - 1).bit_length()
    rows = centroids.reshape(groups, count, depth)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, width - count))
    # from `count` on there is nothing
    order = torch.arange(width, device=rows.device).expand(groups, width)
    while width > 1:
        parts = rows.view(-1, width, depth)
        real = (order < count).view(-1, width, 1)
        number = real.sum(1, keepdim=True)
        mean = (parts * real).sum(1, keepdim=True) / number
        spread = (parts - mean) * real
        middle = mean.view(groups, -1, depth)
        ahead = torch.cat([middle[:, 1:], middle[:, -1:]], 1)
        behind = torch.cat([middle[:, :1], middle[:, :-1]], 1)
        axis = _widest(spread)
        turned = ((ahead - behind).view_as(axis) * axis).sum(-1, keepdim=True) < 0
        place = (spread * torch.where(turned, -axis, axis)).sum(-1, keepdim=True)
        place = place.masked_fill(~real, torch.inf)
        sorted_places = place.squeeze(-1).sort(dim=-1, stable=True).indices
        # as many in either half, and what is empty behind them
        number = number.squeeze(-1)
        first = (number + 1) // 2
        inside = torch.arange(width // 2, device=rows.device)
        rank = torch.cat([inside.expand(len(number), -1), first + inside], 1)
        some = torch.cat([inside < first, first + inside < number], 1)
        chosen = sorted_places.gather(1, rank.clamp(max=width - 1))
        rows = parts.gather(1, chosen.unsqueeze(-1).expand(-1, -1, depth)).view(groups, -1, depth)
        order = order.reshape(-1, width).gather(1, chosen).masked_fill(~some, count)
        order = order.view(groups, -1)
        width //= 2
    kept = (order == count).sort(dim=-1, stable=True).indices[:, :count]
    return order.gather(1, kept).view(batch, heads, count)


def _widest(spread: Tensor) -> Tensor:
    """Directions of about the largest spread, ``[G, 1, D]``, from the row that is furthest off."""
    far = spread.square().sum(-1).argmax(-1)
    axis = spread[torch.arange(far.shape[0], device=far.device), far].unsqueeze(1)
    for _ in range(_STEPS):
        along = (spread * axis).sum(-1, keepdim=True)
        axis = torch.nn.functional.normalize((spread * along).sum(1, keepdim=True), dim=-1)
    return axis
