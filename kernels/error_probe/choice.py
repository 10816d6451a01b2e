"""What is exact under a budget of keys, given the errors."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.rank_levels import rank_levels


def choose_within(error: Tensor, count: Tensor, density: float) -> Tensor:
    """Greedy choice under a budget of keys.

    Args:
        error: ``[B, H, Nq, Nk]``, what a block's stand-in would be off by, of all its keys.
        count: int64 ``[B, H, Nk]``, keys in a block; 0 can never be chosen.
        density: share of all keys that a row may take, at least one block.

    Returns:
        bool, as ``error``.
    """
    keys = count.unsqueeze(-2)
    ratio = torch.where(keys > 0, error / keys.clamp(min=1), -torch.inf)
    budget = (count.sum(-1).double() * density).floor()[..., None, None]
    chosen = rank_levels(ratio, keys, budget, inclusive=True) > 0
    # one at least: the best, the first of equals
    best = torch.zeros_like(chosen).scatter_(-1, ratio.argmax(-1, keepdim=True), True)
    return chosen | (best & (keys > 0))
