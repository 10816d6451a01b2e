"""The third verb: compute what a plan asks for, as a partial."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_attention import block_attention
from dit_accel.kernels.token_attention import token_attention
from dit_accel.layout import Blocked
from dit_accel.partial import Partial, merge
from dit_accel.recorder import span
from dit_accel.rest import Drop, Rest
from dit_accel.types import EXACT, Context, Plan, Report, TokenPlan

_CHUNK_BYTES = 32 * 2**20


def attend(blocked: Blocked, plan: Plan | TokenPlan, rest: Rest, ctx: Context) -> Partial:
    """Exact pairs and rest under one softmax normaliser.

    Always equal to ``merge`` of the exact pairs alone and the rest alone.

    Args:
        blocked: queries, keys, values and their blocks.
        plan: what becomes of each pair of blocks, or of each pair of a query token and a block.
        rest: what stands in for the pairs left to it.
        ctx: handed to the rest.

    Returns:
        The partial, in the model's order; ``out`` in ``q``'s dtype.
    """
    outside = getattr(rest, "outside", None)
    kept: Partial | None = None if outside is None else outside(blocked, plan, ctx)
    if kept is not None:
        inside = direct(blocked, plan, ctx)
        with span("merge"):
            return merge(inside, kept)
    if isinstance(plan, TokenPlan):
        return Partial(
            *token_attention(
                blocked.q,
                blocked.k,
                blocked.v,
                plan.select,
                k_perm=blocked.keys.perm,
                k_offsets=blocked.keys.offsets,
                key_valid=blocked.geometry.key_valid,
                scale=blocked.scale,
                rest=rest.terms(blocked, ctx),
            )
        )
    out, lse = block_attention(
        blocked.q,
        blocked.k,
        blocked.v,
        plan.code,
        q_perm=blocked.queries.perm,
        q_offsets=blocked.queries.offsets,
        k_perm=blocked.keys.perm,
        k_offsets=blocked.keys.offsets,
        key_valid=blocked.geometry.key_valid,
        scale=blocked.scale,
        rest=rest.terms(blocked, ctx),
        levels=plan.levels,
        q_longest=blocked.queries.longest,
        k_longest=blocked.keys.longest,
    )
    return Partial(out, lse)


def direct(blocked: Blocked, plan: Plan | TokenPlan, ctx: Context) -> Partial:
    """The plan's exact pairs alone."""
    return attend(blocked, plan, Drop(), ctx)


def dense_pairs(q: Tensor, key_valid: Tensor | None) -> Tensor:
    """int64 ``[B, H]``: every query with every valid key."""
    batch, heads, length = q.shape[:3]
    if key_valid is None:
        return torch.full((batch, heads), length * length, dtype=torch.int64, device=q.device)
    return (key_valid.sum(-1, dtype=torch.int64) * length).unsqueeze(1).expand(batch, heads)


def report(blocked: Blocked, plan: Plan | TokenPlan) -> Report:
    """What a plan computes exactly, counted in pairs of a query and a valid key."""
    batch, heads = blocked.q.shape[:2]
    count = blocked.summary().count.expand(batch, heads, -1)
    sizes = blocked.queries.sizes.expand(batch, heads, -1)
    if isinstance(plan, TokenPlan):
        exact = _count_tokens(plan.select.expand(batch, heads, -1, -1), count)
        return Report(exact, dense_pairs(blocked.q, blocked.geometry.key_valid))
    code = plan.code.expand(batch, heads, -1, -1)
    exact = torch.empty(batch, heads, dtype=torch.int64, device=count.device)
    # a few heads at a time; a row's keys are below 2**24, so fp32 counts them exactly
    step = max(1, _CHUNK_BYTES // (4 * batch * code[0, 0].numel()))
    for h in range(0, heads, step):
        some = slice(h, h + step)
        keys = (code[:, some] == EXACT).float() @ count[:, some].float().unsqueeze(-1)
        exact[:, some] = (keys.squeeze(-1).double() * sizes[:, some]).sum(-1).long()
    return Report(exact, dense_pairs(blocked.q, blocked.geometry.key_valid))


def _count_tokens(select: Tensor, count: Tensor) -> Tensor:
    """int64 ``[B, H]``: pairs of a query token and a valid key of a block that it selects."""
    batch, heads = select.shape[:2]
    exact = torch.empty(batch, heads, dtype=torch.int64, device=select.device)
    for b in range(batch):
        for h in range(heads):
            exact[b, h] = (select[b, h].sum(0) * count[b, h]).sum()
    return exact
