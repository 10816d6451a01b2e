"""The choice in plain torch: a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def topk_mask(score: Tensor, wanted: Tensor) -> Tensor:
    best, order = score.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(score.shape[-1], device=score.device)
    take = (rank < wanted[..., None, None]) & (best > -torch.inf)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, take)
