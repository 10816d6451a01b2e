"""Routes that decide for every query token: VMoBA (arXiv 2506.23858)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dit_accel.density import Budget, budget, share_at
from dit_accel.errors import InputError
from dit_accel.layout import Blocked, Statistic
from dit_accel.types import Context, TokenPlan

if TYPE_CHECKING:
    from dit_accel.rest import Rest


@dataclass(frozen=True, slots=True)
class Gate:
    """Blocks by the product of a query and the block's mean key, ``g_nj = q_n·k̄_j``.

    Gates are min-max normalised over a head's pairs. A token's own block is always selected, text
    blocks are for everybody, and text tokens select everything.

    Attributes:
        threshold: above 0, at most 1; by layer or by step if need be. With ``mode="threshold"`` the
            share of all the normalised gate that own blocks and the best others must reach; with
            ``mode="topk"`` the share of all pairs that is selected, own blocks included.
        scope: ``"head"`` chooses among all pairs of a head, the paper's global selection;
            ``"token"`` for every token by itself.
        mode: by the sum of the gates, or by their number.
    """

    threshold: Budget = 0.25
    scope: Literal["head", "token"] = "head"
    mode: Literal["threshold", "topk"] = "threshold"

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", budget("Gate: threshold", self.threshold))
        for name, known in (("scope", ("head", "token")), ("mode", ("threshold", "topk"))):
            if getattr(self, name) not in known:
                raise InputError(
                    f"Gate: {name}: expected {' or '.join(known)}, got {getattr(self, name)!r}"
                )

    @property
    def budget(self) -> tuple[str, Budget]:
        """The budget."""
        return "threshold", self.threshold

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def refuses(self, rest: Rest) -> str | None:
        """Why a rest makes no sense beside this route, if it does not."""
        if getattr(rest, "taylor", None) == "rest":
            return "taylor='rest' would need a D x D sum for every token; take 'global' or None"
        return None

    def __call__(self, blocked: Blocked, rest: Rest, ctx: Context) -> TokenPlan:
        blocks, columns = blocked.keys, blocked.keys.num_video
        batch, heads, length, _ = blocked.q.shape
        select = torch.ones(
            batch, heads, length, blocks.num_blocks, dtype=torch.bool, device=blocked.q.device
        )
        threshold = share_at(*self.budget, ctx)
        if threshold == 1 or columns == 0:
            return TokenPlan(select)
        summary = blocked.summary()
        own = block_of(blocks.perm, blocks.offsets)
        count = summary.count.expand(batch, heads, -1)[..., :columns]
        is_video = torch.ones(length, dtype=torch.bool, device=blocked.q.device)
        start, stop = blocked.geometry.text_span
        is_video[start:stop] = False
        tokens = is_video.nonzero().squeeze(-1)
        # one head at a time: its gates are L x Nk
        for b in range(batch):
            for h in range(heads):
                query = blocked.q[b, h, tokens].to(summary.k_mean.dtype)
                gate = query @ summary.k_mean[b, h, :columns].mT
                mine = own[b if own.shape[0] > 1 else 0, h if own.shape[1] > 1 else 0, tokens]
                select[b, h, tokens, :columns] = self._choose(
                    gate, mine, count[b, h] > 0, threshold
                )
        return TokenPlan(select)

    def _choose(self, gate: Tensor, own: Tensor, full: Tensor, threshold: float) -> Tensor:
        """bool ``[n, N]`` for such gates, own blocks ``[n]`` and blocks with keys ``[N]``."""
        chosen = torch.zeros_like(gate, dtype=torch.bool)
        chosen.scatter_(1, own.unsqueeze(1), True)
        if not bool(full.any()):
            return chosen
        gate = gate.masked_fill(~full, -torch.inf)
        low = gate[:, full].min()
        gate = (gate - low) / (gate.max() - low).clamp(min=torch.finfo(gate.dtype).tiny)
        gate = gate.clamp_(min=-1).double()  # -1 marks blocks without a key
        if self.scope == "head":
            flat = _choose_row(gate.view(1, -1), chosen.view(1, -1), threshold, self.mode)
            return flat.view(gate.shape)
        return _choose_row(gate, chosen, threshold, self.mode)


def _choose_row(
    gate: Tensor, own: Tensor, threshold: float, mode: Literal["threshold", "topk"]
) -> Tensor:
    """The best of every row beside its own, until they reach the threshold.

    Args:
        gate: fp64 ``[R, M]`` in [0, 1]; negative where nothing can be chosen.
        own: bool ``[R, M]``, chosen already.
        threshold: share of the row's sum, or of the number of what can be chosen.
        mode: which of the two.
    """
    can = gate >= 0
    worth = gate.clamp(min=0) if mode == "threshold" else can.double()
    wanted = worth.sum(-1, keepdim=True) * threshold
    if mode == "topk":
        wanted = (wanted + 1e-9).floor().clamp(min=1)
    have = (worth * own).sum(-1, keepdim=True)
    order = gate.masked_fill(own, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    value = (worth * ~own).gather(-1, order)
    before = have + value.cumsum(-1) - value
    take = (before < wanted) & can.gather(-1, order) & ~own.gather(-1, order)
    return own | torch.zeros_like(own).scatter_(-1, order, take)


def block_of(perm: Tensor, offsets: Tensor) -> Tensor:
    """int64 ``[B|1, H|1, L]``: the block that each token is in.

    Args:
        perm: int64 ``[B|1, H|1, L]``.
        offsets: int32 ``[B|1, H|1, N + 1]``.
    """
    lead = tuple(max(a, b) for a, b in zip(perm.shape[:2], offsets.shape[:2], strict=True))
    place = torch.arange(perm.shape[-1], device=perm.device)
    ends = offsets[..., 1:].long().expand(*lead, -1).contiguous()
    number = torch.searchsorted(ends, place.expand(*lead, -1).contiguous(), right=True)
    return torch.empty_like(number).scatter_(-1, perm.expand(*lead, -1), number)
