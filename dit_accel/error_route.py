"""Routing by the error that a rest would leave: SVG-EAR (arXiv 2603.08982)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.density import Budget, budget, share_at
from dit_accel.kernels.error_probe import error_probe
from dit_accel.kernels.rank_levels import rank_levels
from dit_accel.layout import Blocked, Statistic
from dit_accel.types import EXACT, REST, Context, Plan

if TYPE_CHECKING:
    from dit_accel.rest import Rest


@dataclass(frozen=True, slots=True)
class ErrorAware:
    """The pairs whose stand-in would be furthest off, for what they cost.

    ``e_ij`` is the error of the rest's weights on block ``j``, seen from the mean of query block
    ``i`` (`dit_accel.kernels.error_probe`). Every row takes blocks by falling ``e_ij / (n_i n_j)``
    while their keys fit the budget of ``density`` of all keys, and at least one.

    The mean speaks for its queries only where these are alike, as in clusters; on blocks of unlike
    queries routing by score may be the better choice.

    Attributes:
        density: above 0, at most 1; by layer or by step if need be.
    """

    density: Budget = 0.22

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", budget("ErrorAware: density", self.density))

    @property
    def budget(self) -> tuple[str, Budget]:
        """The budget."""
        return "density", self.density

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def __call__(self, blocked: Blocked, rest: Rest, ctx: Context) -> Plan:
        rows, columns = blocked.queries.num_video, blocked.keys.num_video
        batch, heads = blocked.q.shape[:2]
        count = blocked.summary().count[..., :columns].expand(batch, heads, columns)
        code = torch.full(
            (batch, heads, blocked.queries.num_blocks, blocked.keys.num_blocks),
            EXACT,
            dtype=torch.int8,
            device=blocked.q.device,
        )
        if rows and columns:
            queries = blocked.query_mean()[:, :, :rows]
            error = error_probe(
                queries,
                blocked.k,
                rest.log_weight(blocked, queries)[..., :columns],
                perm=blocked.keys.perm,
                offsets=blocked.keys.offsets,
                num_blocks=columns,
                scale=blocked.scale,
                key_valid=blocked.geometry.key_valid,
            )
            chosen = choose_within(error, count, share_at(*self.budget, ctx))
            code[:, :, :rows, :columns] = torch.where(chosen, EXACT, REST).to(torch.int8)
        return Plan(code)


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
