"""Guards and dispatch of token attention."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.backends import implementation, resolve, triton_refusal
from dit_accel.kernels.block_attention.api import RestTerms
from dit_accel.kernels.block_summary.api import check_blocks, check_valid
from dit_accel.kernels.words import Words


def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor | Words,
    *,
    k_perm: Tensor,
    k_offsets: Tensor,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    rest: RestTerms | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention by a plan over pairs of a query token and a key block.

    Args:
        q, k, v: ``[B, H, L, D]`` floating, any strides, in the model's order.
        select: bool ``[B|1, H|1, L, Nk]``, or as much in `Words`; query tokens in the model's
            order; ``True`` is exact, ``False`` left to ``rest`` (left out without one).
        k_perm: int64 ``[B|1, H|1, L]``, the order of the keys.
        k_offsets: int32 ``[B|1, H|1, Nk + 1]``, where the order is cut into blocks.
        key_valid: bool ``[B, L]``; ``False`` keys are never read.
        scale: of the logits; ``D ** -0.5`` by default.
        rest: what stands in for the blocks not selected; ``cov_scope="rest"`` is refused, since
            every token would need a covariance of its own.
        backend: ``"auto"``, ``"reference"``, or ``"triton"``, which takes no ``rest``; a named one
            never falls back.

    Returns:
        ``out`` ``[B, H, L, D]`` in ``q``'s dtype; ``lse`` ``[B, H, L]``, natural log, in fp32 (fp64
        for fp64). A row without any key is ``(0, -inf)``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or gradients are asked for.
    """
    if q.ndim != 4 or q.shape != k.shape or k.shape != v.shape:
        raise ValueError(
            f"q, k, v: expected one shape [B, H, L, D], got {list(q.shape)}, {list(k.shape)}, "
            f"{list(v.shape)}"
        )
    check_blocks("k", k_perm, k_offsets, k)
    check_valid(key_valid, k)
    batch, heads, length, depth = q.shape
    blocks = k_offsets.shape[-1] - 1
    stored = select.word if isinstance(select, Words) else select
    if (
        stored.dtype != (torch.int16 if isinstance(select, Words) else torch.bool)
        or stored.ndim != 4
        or tuple(select.shape[2:]) != (length, blocks)
        or select.shape[0] not in (1, batch)
        or select.shape[1] not in (1, heads)
    ):
        raise ValueError(
            f"select: expected bool [{batch}|1, {heads}|1, {length}, {blocks}], got "
            f"{stored.dtype} {list(select.shape)}"
        )
    if rest is not None and rest.cov_sum is not None and rest.cov_scope == "rest":
        raise ValueError("rest: expected cov_scope 'global' for token attention, got 'rest'")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("q, k, v: expected no gradient to be asked for: run under torch.no_grad()")
    refusal = triton_refusal(q)
    if rest is not None:
        refusal = "it computes exact pairs alone, and no rest"
    elif not q.dtype == k.dtype == v.dtype:
        refusal = f"it takes one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    chosen = resolve(backend, q, ("auto", "reference", "triton"), refusal)
    run = implementation("token_attention", chosen).token_attention
    scale = depth**-0.5 if scale is None else scale
    with torch.no_grad():
        out, lse = run(q, k, v, select, k_perm, k_offsets, key_valid, scale, rest)
    return out, lse
