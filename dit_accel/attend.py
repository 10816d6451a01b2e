"""The third verb: compute what a plan asks for, as a partial."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.kernels.block_attention import block_attention
from dit_accel.kernels.dense_attention import partial_attention
from dit_accel.kernels.pair_count import pair_count
from dit_accel.kernels.token_attention import token_attention
from dit_accel.layout import Blocked
from dit_accel.partial import Partial, merge
from dit_accel.recorder import span
from dit_accel.rest import Drop, Rest
from dit_accel.types import Context, Plan, Prefix, Report, TokenPlan


def attend(
    blocked: Blocked,
    plan: Plan | TokenPlan,
    rest: Rest,
    ctx: Context,
    pairs: Tensor | None = None,
) -> Partial:
    """Exact pairs, rest and prefix under one softmax normaliser.

    Always equal to ``merge`` of the exact pairs alone, the rest alone, and the prefix alone.

    Args:
        blocked: queries, keys, values and their blocks.
        plan: what becomes of each pair of blocks, or of each pair of a query token and a block.
        rest: what stands in for the pairs left to it.
        ctx: handed to the rest; it has the prefix, if there is one.
        pairs: of `room_for_pairs`, to be written how many pairs of the sequence were exact.

    Returns:
        The partial, in the model's order; ``out`` in ``q``'s dtype.
    """
    outside = getattr(rest, "outside", None)
    kept: Partial | None = None if outside is None else outside(blocked, plan, ctx)
    if kept is not None:
        return _within(blocked, plan, Drop(), ctx, onto=kept, pairs=pairs)
    own = _within(blocked, plan, rest, ctx, pairs=pairs)
    return _merged(own, *beyond(blocked.q, ctx, blocked.scale, rest))


def _merged(*partials: Partial) -> Partial:
    if len(partials) == 1:
        return partials[0]
    with span("merge"):
        return merge(*partials)


def _within(
    blocked: Blocked,
    plan: Plan | TokenPlan,
    rest: Rest,
    ctx: Context,
    onto: Partial | None = None,
    pairs: Tensor | None = None,
) -> Partial:
    """Exact pairs and rest of the sequence itself, on top of attention to other keys."""
    others = () if onto is None else (onto,)
    if isinstance(plan, Plan) and plan.whole:
        valid = blocked.geometry.key_valid
        whole = attend_all(blocked.q, blocked.k, blocked.v, key_valid=valid, scale=blocked.scale)
        return _merged(whole, *others)
    if isinstance(plan, TokenPlan):
        chosen = Partial(
            *token_attention(
                blocked.q,
                blocked.k,
                blocked.v,
                plan.chosen,
                k_perm=blocked.keys.perm,
                k_offsets=blocked.keys.offsets,
                key_valid=blocked.geometry.key_valid,
                scale=blocked.scale,
                rest=rest.terms(blocked, ctx),
            )
        )
        return _merged(chosen, *others)
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
        long_rows=blocked.queries.num_blocks - blocked.queries.num_video,
        onto=None if onto is None else (onto.out, onto.lse),
        pairs=pairs,
    )
    return Partial(out, lse)


def direct(blocked: Blocked, plan: Plan | TokenPlan, ctx: Context) -> Partial:
    """The plan's exact pairs alone."""
    return _within(blocked, plan, Drop(), ctx)


def attend_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_valid: Tensor | None = None,
    scale: float | None = None,
) -> Partial:
    """Every query with every one of some keys, to be merged with attention to others.

    Args:
        q: ``[B, H, L, D]``.
        k, v: ``[B, H, M, D]``, such as references that stand beside the sequence.
        key_valid: bool ``[B, M]``; ``False`` keys contribute nothing.
        scale: of the logits; ``D ** -0.5`` by default.

    Returns:
        The partial; ``out`` in ``q``'s dtype.
    """
    return Partial(*partial_attention(q, k, v, key_valid=key_valid, scale=scale))


def dense(q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None) -> Partial:
    """Every pair of the sequence, and the prefix."""
    key_valid = ctx.geometry.key_valid
    own = attend_all(q, k, v, key_valid=key_valid, scale=scale)
    return merge(own, *beyond(q, ctx, scale))


def beyond(
    q: Tensor, ctx: Context, scale: float | None = None, rest: Rest | None = None
) -> list[Partial]:
    """Partials over what lies beyond the sequence: the prefix, and the zeros after it.

    Args:
        q: ``[B, H, L, D]``.
        ctx: it has the prefix, if there is one.
        scale: of the logits; ``D ** -0.5`` by default.
        rest: one with memory may keep the prefix's partial.

    Raises:
        InputError: the prefix does not fit the queries.
    """
    prefix, parts = ctx.prefix, []
    if prefix is None:
        return []
    if prefix.length:
        of_memory = getattr(rest, "of_prefix", None)
        parts.append((of_memory or of_prefix)(q, ctx, scale))
    if prefix.zeros:
        empty = Partial.empty_like(q)
        parts.append(Partial(empty.out, empty.lse.fill_(math.log(prefix.zeros))))
    return parts


def of_prefix(q: Tensor, ctx: Context, scale: float | None = None) -> Partial:
    """The partial over the keys of the prefix, computed.

    Raises:
        InputError: the prefix does not fit the queries.
    """
    assert ctx.prefix is not None
    return attend_all(q, *_load(q, ctx.prefix), scale=scale)


def with_prefix(
    q: Tensor, k: Tensor, v: Tensor, ctx: Context
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of the sequence, the prefix and the zeros after it, and which are valid.

    Args:
        q, k, v: ``[B, H, L, D]``.
        ctx: it has the prefix.

    Returns:
        Keys and values ``[B, H, L + length + zeros, D]``, and bool ``[B, L + length + zeros]``, or
        ``None`` without padding.

    Raises:
        InputError: the prefix does not fit the queries.
    """
    prefix, valid = ctx.prefix, ctx.geometry.key_valid
    assert prefix is not None
    keys, values = [k], [v]
    if prefix.length:
        for parts, one in zip((keys, values), _load(q, prefix), strict=True):
            parts.append(one)
    for parts in (keys, values):
        parts.append(q.new_zeros(*q.shape[:2], prefix.zeros, q.shape[3]))
    if valid is not None:
        others = valid.new_ones(valid.shape[0], prefix.length + prefix.zeros)
        valid = torch.cat([valid, others], 1)
    return torch.cat(keys, 2), torch.cat(values, 2), valid


def _load(q: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor]:
    """Keys and values of a prefix, which has some, checked."""
    keys, values = prefix.load()
    batch, heads, _, depth = q.shape
    expected = (batch, heads, prefix.length, depth)
    for name, x in (("keys", keys), ("values", values)):
        if tuple(x.shape) != expected or x.dtype != q.dtype or x.device != q.device:
            raise InputError(
                f"prefix: {name}: expected {list(expected)} of {q.dtype} on {q.device} as q, got "
                f"{list(x.shape)} of {x.dtype} on {x.device}"
            )
    return keys, values


def dense_pairs(q: Tensor, key_valid: Tensor | None, prefix: Prefix | None = None) -> Tensor:
    """int64 ``[B, H]``: every query with every valid key, of the prefix too."""
    batch, heads, length = q.shape[:3]
    others = 0 if prefix is None else prefix.length
    if key_valid is None:
        return _all_pairs(batch, heads, length * (length + others), q.device)
    every_valid = (key_valid.sum(-1, dtype=torch.int64) + others) * length
    return every_valid.unsqueeze(1).expand(batch, heads)


@lru_cache(maxsize=64)
def _all_pairs(batch: int, heads: int, every: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a cached inference tensor could not be used outside
        return torch.full((batch, heads), every, dtype=torch.int64, device=device)


def room_for_pairs(plan: Plan | TokenPlan, q: Tensor) -> Tensor | None:
    """Where `attend` counts pairs, int64 ``[B, H]``; ``None`` for plans of which it counts none."""
    if isinstance(plan, TokenPlan) or plan.whole:
        return None
    return torch.empty(q.shape[:2], dtype=torch.int64, device=q.device)


def report(
    blocked: Blocked,
    plan: Plan | TokenPlan,
    prefix: Prefix | None = None,
    computed: int = 0,
    pairs: Tensor | None = None,
) -> Report:
    """What a plan computes exactly, counted in pairs of a query and a valid key.

    Args:
        blocked: queries, keys, and their blocks.
        plan: what became of each pair.
        prefix: what the queries see besides.
        computed: keys of the prefix that attention was computed to, all or none.
        pairs: exact ones, where `attend` counted them.
    """
    length = blocked.q.shape[2]
    every = dense_pairs(blocked.q, blocked.geometry.key_valid, prefix)
    exact = _exact_pairs(blocked, plan) if pairs is None else pairs
    return Report(exact + computed * length if computed else exact, every)


def _exact_pairs(blocked: Blocked, plan: Plan | TokenPlan) -> Tensor:
    batch, heads = blocked.q.shape[:2]
    # without padding a block's valid keys are its tokens, and no statistics are needed
    padded = blocked.geometry.key_valid is not None
    keys = blocked.summary().count if padded else blocked.keys.sizes
    if isinstance(plan, TokenPlan):
        return pair_count(plan.chosen, keys).expand(batch, heads)
    return pair_count(plan.code, keys, blocked.queries.sizes).expand(batch, heads)
