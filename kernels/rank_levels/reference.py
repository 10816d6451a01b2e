"""Levels by rank in plain torch: every row sorted, some heads at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.kernels.ragged import pick

_LEAST = torch.finfo(torch.float32).tiny
"""What a row is worth at least, where bounds are shares of it."""
WORKSPACE_BYTES = 64 * 2**20
"""About what the rows of one chunk may take when they are sorted."""


def rank_levels(
    score: Tensor,
    worth: Tensor,
    bounds: Tensor,
    inclusive: bool,
    shares: bool,
    codes: Sequence[int],
    levels: Tensor,
    beyond: int,
) -> None:
    batch, heads, rows, width = score.shape
    if levels.shape != score.shape:
        levels.fill_(beyond)
    meant = torch.tensor(codes, dtype=torch.int8, device=score.device)
    step = max(1, WORKSPACE_BYTES // max(1, 40 * width))
    for b in range(batch):
        for h in range(heads):
            values, limits = pick(worth, b, h), pick(bounds, b, h).double()
            values = values.expand(rows, -1)
            for first in range(0, rows, step):
                some = slice(first, min(rows, first + step))
                line = score[b, h, some]
                limit = limits.expand(rows, -1)[some]
                if shares:
                    within = values[some].double().masked_fill(line == -torch.inf, 0)
                    limit = limit * within.sum(-1, keepdim=True).clamp(min=_LEAST)
                found = _levels(line, values[some], limit, inclusive)
                levels[b, h, some, :width] = meant[found.int()]


def _levels(score: Tensor, worth: Tensor, bounds: Tensor, inclusive: bool) -> Tensor:
    best, order = score.sort(dim=-1, descending=True, stable=True)
    added = worth.gather(-1, order).double()
    reach = added.cumsum(-1)
    if not inclusive:
        reach = reach - added
    within = torch.zeros_like(order, dtype=torch.int8)
    for bound in bounds.unbind(-1):
        limit = bound.unsqueeze(-1)
        within += reach <= limit if inclusive else reach < limit
    within.masked_fill_(best == -torch.inf, 0)
    return torch.zeros_like(within).scatter_(-1, order, within)
