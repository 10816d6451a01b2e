"""Routes: which pairs of blocks deserve exact attention.

A route is called as ``route(blocked, rest, ctx) -> Plan | TokenPlan``. It decides over video blocks
only: rows and columns of text blocks are exact whatever it says. One that some rests make no sense
with has a method ``refuses(rest)``, which gives the reason or ``None``; one that has a budget has a
property ``budget``, its name and value (`dit_accel.density.Budget`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dit_accel.density import Budget, budget, share_at
from dit_accel.errors import InputError
from dit_accel.kernels.pooled_topk import pooled_topk, share_of
from dit_accel.kernels.topk import topk_mask
from dit_accel.layout import Blocked, Statistic
from dit_accel.types import EXACT, REST, Context, Plan, TokenPlan

if TYPE_CHECKING:
    from dit_accel.rest import Rest

_CHUNK_BYTES = 32 * 2**20


@runtime_checkable
class Route(Protocol):
    """Decides which pairs of blocks are computed exactly.

    One whose plans have pooled levels says so by ``pools = True``.
    """

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Parts of the summary that it reads."""

    def __call__(self, blocked: Blocked, rest: Rest, ctx: Context) -> Plan | TokenPlan: ...


@dataclass(frozen=True, slots=True)
class Everything:
    """Every pair exact: dense attention, by way of the blocks."""

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def __call__(self, blocked: Blocked, rest: Rest, ctx: Context) -> Plan:
        code = torch.full(
            (1, 1, blocked.queries.num_blocks, blocked.keys.num_blocks),
            EXACT,
            dtype=torch.int8,
            device=blocked.q.device,
        )
        return Plan(code)


@dataclass(frozen=True, slots=True)
class PooledScore:
    """Blocks by the product of their means, as PISA routes (arXiv 2602.01077).

    ``score_ij = s q̄_i·k̄_j``, and ``+ log(‖C_j‖_F + 1e-5)`` with ``bias``. Key blocks without any
    valid key are never selected, and not counted in ``N_k``.

    Attributes:
        select: ``"topk"`` takes the ``max(1, ⌊density · N_k⌋)`` best blocks of every row;
            ``"topp"`` the fewest blocks whose softmax over ``n_j exp(score_ij)`` adds up to ``p``.
        density: above 0, at most 1; by layer or by step if need be.
        p: the same.
        bias: add the norm of the block's covariance.
    """

    select: Literal["topk", "topp"] = "topk"
    density: Budget = 0.15
    p: Budget = 0.9
    bias: bool = True

    def __post_init__(self) -> None:
        if self.select not in ("topk", "topp"):
            raise InputError(f"PooledScore: select: expected 'topk' or 'topp', got {self.select!r}")
        for name in ("density", "p"):
            value = budget(f"PooledScore: {name}", getattr(self, name))
            object.__setattr__(self, name, value)

    @property
    def budget(self) -> tuple[str, Budget]:
        """The budget that counts."""
        return ("density", self.density) if self.select == "topk" else ("p", self.p)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return ("cov",) if self.bias else ()

    def __call__(self, blocked: Blocked, rest: Rest, ctx: Context) -> Plan:
        rows, columns = blocked.queries.num_video, blocked.keys.num_video
        summary = blocked.summary(*self.needs)
        norm = summary.cov_norm if self.bias else None
        share = share_at(*self.budget, ctx)
        if self.select == "topk":
            return Plan(
                pooled_topk(
                    blocked.query_mean(),
                    summary.k_mean,
                    summary.count,
                    norm,
                    rows=rows,
                    columns=columns,
                    scale=blocked.scale,
                    density=share,
                )
            )
        batch, heads = blocked.q.shape[:2]
        query = blocked.query_mean()[:, :, :rows] * blocked.scale
        key = summary.k_mean[:, :, :columns]
        count = summary.count[..., :columns].expand(batch, heads, columns)
        shift = count.to(key.dtype).log()
        if norm is not None:
            shift = shift + (norm[:, :, :columns] + 1e-5).log()
        code = torch.full(
            (batch, heads, blocked.queries.num_blocks, blocked.keys.num_blocks),
            EXACT,
            dtype=torch.int8,
            device=key.device,
        )
        if rows and columns:
            # a few heads at a time: the scores of all would be as large as a tensor of tokens
            step = max(1, _CHUNK_BYTES // (batch * rows * columns * key.itemsize))
            for h in range(0, heads, step):
                some = slice(h, h + step)
                score = query[:, some] @ key[:, some].mT
                score += shift[:, some].unsqueeze(-2)
                chosen = choose_topp(score, share)
                code[:, some, :rows, :columns] = torch.where(chosen, EXACT, REST).to(torch.int8)
        return Plan(code)


def choose_topk(score: Tensor, available: Tensor, density: float) -> Tensor:
    """The ``max(1, ⌊density · n⌋)`` best of every row.

    Args:
        score: ``[B, H, Nq, Nk]``; ``-inf`` where a block may not be chosen.
        available: int64 ``[B, H]``, how many blocks ``n`` may be chosen.
        density: above 0, at most 1.

    Returns:
        bool, as ``score``. A row with nothing available stays empty.
    """
    return topk_mask(score, share_of(available, density))


def choose_topp(logit: Tensor, p: float) -> Tensor:
    """The fewest of every row whose softmax adds up to at least ``p``, one or more.

    Args:
        logit: ``[B, H, Nq, Nk]``; ``-inf`` where a block may not be chosen.
        p: above 0, at most 1; at 1 every block that may be is chosen.
    """
    if p >= 1:
        return logit > -torch.inf
    best, order = logit.sort(dim=-1, descending=True, stable=True)
    mass = best.double().softmax(-1)
    before = mass.cumsum(-1) - mass
    take = (before < p) & (best > -torch.inf)
    take[..., :1] |= best[..., :1] > -torch.inf
    return torch.zeros_like(logit, dtype=torch.bool).scatter_(-1, order, take)
