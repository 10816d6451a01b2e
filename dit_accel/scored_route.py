"""A route by any score: what a new method needs to write is one function.

`docs/new_method.md` has a worked example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.density import Budget, budget, share_at
from dit_accel.errors import InputError
from dit_accel.kernels.block_summary import block_mean
from dit_accel.layout import Blocked, Statistic
from dit_accel.route import choose_topk
from dit_accel.types import EXACT, REST, Blocks, Context, Geometry, Plan

if TYPE_CHECKING:
    from dit_accel.rest import Rest


@dataclass(frozen=True, slots=True)
class Scored:
    """The ``max(1, ⌊density · N_k⌋)`` best key blocks of every row of query blocks, by a function.

    Text stays exact, and key blocks without any valid key are never chosen, whatever it says.

    Attributes:
        score: called as ``score(blocked, ctx)``; ``[B|1, H|1, Nq, Nk]`` over the video blocks, the
            first ``num_video`` of each side. Larger is better.
        density: above 0, at most 1; by layer or by step if need be.
    """

    score: Callable[[Blocked, Context], Tensor]
    density: Budget = 0.15

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", budget("Scored: density", self.density))

    @property
    def budget(self) -> tuple[str, Budget]:
        """The budget."""
        return "density", self.density

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def __call__(self, blocked: Blocked, rest: Rest, ctx: Context) -> Plan:
        rows, columns = blocked.queries.num_video, blocked.keys.num_video
        full = (blocked.summary().count[..., :columns] > 0).unsqueeze(-2)
        score = self.score(blocked, ctx)
        if score.ndim != 4 or tuple(score.shape[2:]) != (rows, columns):
            raise InputError(
                f"Scored: score: expected [B|1, H|1, {rows}, {columns}], got {list(score.shape)}"
            )
        score = torch.where(full, score, -torch.inf)
        available = full.expand(*score.shape[:2], 1, -1).sum((-2, -1))
        code = torch.full(
            (*score.shape[:2], blocked.queries.num_blocks, blocked.keys.num_blocks),
            EXACT,
            dtype=torch.int8,
            device=score.device,
        )
        if rows and columns:
            chosen = choose_topk(score, available, share_at(*self.budget, ctx))
            code[:, :, :rows, :columns] = torch.where(chosen, EXACT, REST).to(torch.int8)
        return Plan(code)


def centres(blocks: Blocks, where: Geometry) -> Tensor:
    """Mean latent frame, row and column of every video block.

    Args:
        blocks: of queries or keys.
        where: what the tokens are.

    Returns:
        fp32 ``[B|1, H|1, num_video, 3]``.
    """
    device = blocks.perm.device
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in where.grid]
    start, stop = where.text_span
    place = torch.zeros(where.length, 3, device=device)
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)
    place[:start], place[stop:] = cells[:start], cells[start:]
    lead = [max(a, b) for a, b in zip(blocks.perm.shape[:2], blocks.offsets.shape[:2], strict=True)]
    mean = block_mean(place.expand(*lead, -1, -1), perm=blocks.perm, offsets=blocks.offsets)
    return mean[:, :, : blocks.num_video]
