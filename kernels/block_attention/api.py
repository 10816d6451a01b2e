"""Guards and dispatch of block attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.backends import BACKENDS, implementation, resolve, triton_refusal
from dit_accel.kernels.block_attention.groups import in_groups
from dit_accel.kernels.block_summary.api import check_blocks, check_valid
from dit_accel.kernels.merge import merge
from dit_accel.kernels.packed import MOST_ROWS, compact
from dit_accel.kernels.pair_count import pair_count

POOLED = (2, 4, 8)
"""Codes of pooled levels: so many consecutive keys of a block are averaged into one."""


@dataclass(frozen=True, slots=True)
class RestTerms:
    """What stands in for the key blocks of code -1, for a kernel.

    Block ``j`` weighs ``n_j exp(s q·k̄_j)`` times a correction, and its value is ``v̄_j``.

    Attributes:
        k_mean, v_mean: ``[B, H, Nk, D]``, fp32 (fp64).
        count: int64 ``[B|1, H|1, Nk]``, valid keys ``n_j``; 0 takes a block out.
        k_var: ``[B, H, Nk, D]`` variances of the keys, for a ``weight`` other than ``"plain"``.
        weight: correction: ``"plain"`` 1; ``"second"`` ``1 + ½σ²``; ``"gaussian"`` ``exp(½σ²)``,
            where ``σ² = s² Σ_d q_d² var_jd``.
        cov_sum: ``[B, H, D, D]``, ``C`` over the video blocks, for the first-order term
            ``s (q C) g / T`` of the numerator; ``None`` for no such term.
        cov_scope: ``"global"``: this ``C``, and ``T`` its tokens. ``"rest"``: ``C`` less what the
            row's blocks of another code add to it, and ``T`` the tokens of its blocks of code -1.
        num_video: how many blocks, the first ones, ``cov_sum`` sums over.
    """

    k_mean: Tensor
    v_mean: Tensor
    count: Tensor
    k_var: Tensor | None = None
    weight: Literal["plain", "second", "gaussian"] = "plain"
    cov_sum: Tensor | None = None
    cov_scope: Literal["global", "rest"] = "global"
    num_video: int = 0


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    code: Tensor,
    *,
    q_perm: Tensor,
    q_offsets: Tensor,
    k_perm: Tensor,
    k_offsets: Tensor,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    rest: RestTerms | None = None,
    levels: tuple[int, ...] | None = None,
    q_longest: int | None = None,
    k_longest: int | None = None,
    long_rows: int = 0,
    onto: tuple[Tensor, Tensor] | None = None,
    pairs: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention by a plan over blocks, exact pairs and rest under one softmax normaliser.

    Args:
        q, k, v: ``[B, H, L, D]`` floating, any strides, in the model's order.
        code: int8 ``[B|1, H|1, Nq, Nk]``: 1 exact, 0 left out, -1 left to ``rest`` (left out
            without one); 2, 4 or 8: so many consecutive valid keys of the block, in its order, are
            averaged into one, and so are their values, whose logit gains the logarithm of how many
            they are (PSA, arXiv 2512.04025).
        q_perm, k_perm: int64 ``[B|1, H|1, L]``, the order of the tokens.
        q_offsets, k_offsets: int32 ``[B|1, H|1, N + 1]``, where the order is cut into blocks.
        key_valid: bool ``[B, L]``; ``False`` keys are never read.
        scale: of the logits; ``D ** -0.5`` by default.
        rest: what stands in for code -1.
        levels: which of 2, 4 and 8 ``code`` may hold; ``None`` looks, and waits for the device.
        q_longest, k_longest: tokens of the longest block, where the caller knows; never less.
        long_rows: query blocks, the last ones, that want more than others, as text does; kernels
            begin with them, and the result is the same.
        onto: attention over other keys, ``out`` and ``lse`` as they are returned, to be merged.
        pairs: int64 ``[B, H]``, contiguous, to be written how many pairs of a query and a valid key
            are exact, as `pair_count` counts them.
        backend: ``"auto"``, or a name from `backends.BACKENDS`; a named one never falls back.

    Returns:
        ``out`` ``[B, H, L, D]`` in ``q``'s dtype; ``lse`` ``[B, H, L]``, natural log, in fp32 (fp64
        for fp64); both in the model's order. A row without any key is ``(0, -inf)``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or gradients are asked for.
    """
    if q.ndim != 4 or q.shape != k.shape or k.shape != v.shape:
        raise ValueError(
            f"q, k, v: expected one shape [B, H, L, D], got {list(q.shape)}, {list(k.shape)}, "
            f"{list(v.shape)}"
        )
    check_blocks("q", q_perm, q_offsets, q)
    check_blocks("k", k_perm, k_offsets, k)
    check_valid(key_valid, k)
    blocks = (q_offsets.shape[-1] - 1, k_offsets.shape[-1] - 1)
    if (
        code.dtype != torch.int8
        or code.ndim != 4
        or tuple(code.shape[2:]) != blocks
        or code.shape[0] not in (1, q.shape[0])
        or code.shape[1] not in (1, q.shape[1])
    ):
        raise ValueError(
            f"code: expected int8 [{q.shape[0]}|1, {q.shape[1]}|1, {blocks[0]}, {blocks[1]}], got "
            f"{code.dtype} {list(code.shape)}"
        )
    if levels is None:
        found = set(torch.unique(code).tolist())
        if not found <= {-1, 0, 1, *POOLED}:
            raise ValueError(
                f"code: expected -1, 0, 1 or a level among {', '.join(map(str, POOLED))}, got "
                f"{sorted(found)}"
            )
        levels = tuple(level for level in POOLED if level in found)
    if onto is not None and (onto[0].shape != q.shape or onto[1].shape != q.shape[:-1]):
        raise ValueError(
            f"onto: expected {list(q.shape)} with {list(q.shape[:-1])}, got {list(onto[0].shape)} "
            f"with {list(onto[1].shape)}"
        )
    if pairs is not None and (
        pairs.dtype != torch.int64 or pairs.shape != q.shape[:2] or not pairs.is_contiguous()
    ):
        raise ValueError(
            f"pairs: expected contiguous int64 {list(q.shape[:2])}, got {pairs.dtype} "
            f"{list(pairs.shape)}"
        )
    if rest is not None and rest.weight != "plain" and rest.k_var is None:
        raise ValueError(f"rest: expected k_var for weight {rest.weight!r}, got None")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("q, k, v: expected no gradient to be asked for: run under torch.no_grad()")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = resolve(backend, q, BACKENDS, _refusal(q, scale, rest, levels, blocks[1]))
    run = implementation("block_attention", chosen).block_attention
    orders = {"q_perm": q_perm, "q_offsets": q_offsets, "k_perm": k_perm, "k_offsets": k_offsets}
    if chosen == "triton":
        return in_groups(
            run,
            *(q, k, v, code),
            key_valid=key_valid,
            rest=rest,
            onto=onto,
            pairs=pairs,
            orders=orders,
            scale=scale,
            q_longest=q_longest,
            k_longest=k_longest,
            levels=levels,
            long_rows=long_rows,
        )
    if pairs is not None:
        sizes = (compact(k_perm, k_offsets, key_valid).offsets, q_offsets)
        pairs.copy_(pair_count(code, *(x.diff(dim=-1) for x in sizes)))
    result: tuple[Tensor, Tensor] = run(
        q, k, v, code, key_valid=key_valid, scale=scale, rest=rest, **orders
    )
    return result if onto is None else merge(*result, *onto)


def _refusal(
    q: Tensor, scale: float, rest: RestTerms | None, levels: tuple[int, ...], blocks: int
) -> str | None:
    """Why the kernel cannot take a call."""
    if rest is not None and rest.cov_sum is not None and rest.cov_scope == "rest":
        return "it has no cov_scope 'rest', which needs a covariance for every row"
    rows = q.shape[2] + sum(q.shape[2] // level + blocks for level in levels)
    if rows > MOST_ROWS:
        return f"it tells {MOST_ROWS} rows of keys and means apart, not {rows}"
    if scale <= 0:
        return f"it takes a positive scale, not {scale}"
    return triton_refusal(q)
