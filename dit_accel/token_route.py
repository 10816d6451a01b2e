"""Routes that decide for every query token: VMoBA (arXiv 2506.23858)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dit_accel.density import Budget, budget, share_at
from dit_accel.errors import InputError
from dit_accel.kernels.packed import remembered
from dit_accel.kernels.token_select import token_select
from dit_accel.kernels.words import Words
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
        threshold = share_at(*self.budget, ctx)
        if threshold == 1 or columns == 0:
            batch, heads, length, _ = blocked.q.shape
            shape = (batch, heads, length, blocks.num_blocks)
            return TokenPlan(Words.full(shape, blocked.q.device))
        if blocked.geometry.key_valid is None:
            mean = blocked.key_mean()
            full = remembered(blocks.perm, blocks.offsets, "full", lambda: blocks.sizes > 0)
        else:  # what is valid in each block is asked for later too
            summary = blocked.summary()
            mean, full = summary.k_mean, summary.count > 0

        def own() -> Tensor:
            return block_of(blocks.perm, blocks.offsets)

        return TokenPlan(
            token_select(
                blocked.q,
                mean,
                remembered(blocks.perm, blocks.offsets, "block_of", own),
                full,
                num_video=columns,
                text_span=blocked.geometry.text_span,
                threshold=threshold,
                scope=self.scope,
                mode=self.mode,
            )
        )


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
