"""Dense attention: torch's own, with the mask and the empty rows put right; and as a partial."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_summary.api import check_valid

PARTIAL_BACKENDS: Final = ("auto", "chunked", "flash")
"""``chunked`` is plain torch, anywhere, fp32 inside; ``flash`` is torch's own flash attention."""


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_valid: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """``softmax(scale · q kᵀ) v`` over the valid keys, by `F.scaled_dot_product_attention`.

    Args:
        q, k, v: ``[B, H, L, D]``.
        key_valid: bool ``[B, L]``; ``False`` keys are left out. ``None`` keeps torch's fast path.
        scale: of the logits; ``D ** -0.5`` by default.

    Returns:
        ``[B, H, L, D]`` in the inputs' dtype; zero for a batch element without any valid key.
    """
    if key_valid is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    check_valid(key_valid, k)
    mask = key_valid[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return torch.where(mask.any(-1, keepdim=True), out, torch.zeros((), dtype=out.dtype))


def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dense attention over some keys, with the normaliser that lets it be merged with others.

    Args:
        q: ``[B, H, Lq, D]``, floating.
        k, v: ``[B, H, Lk, D]`` in ``q``'s dtype, any number of them, any strides.
        key_valid: bool ``[B, Lk]``; ``False`` keys contribute nothing, whatever they hold.
        scale: of the logits; ``D ** -0.5`` by default.
        backend: one of `PARTIAL_BACKENDS`. ``"auto"`` is ``"flash"`` where that can run (no key
            mask, and on CUDA what torch's flash attention takes: fp16 or bf16, ``D`` a multiple of
            8 up to 256), otherwise ``"chunked"``. A named one never falls back.

    Returns:
        ``out`` ``[B, H, Lq, D]`` in ``q``'s dtype; ``lse`` ``[B, H, Lq]``, natural log, in fp32
        (fp64 for fp64). A row without any key is ``(0, -inf)``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, gradients are asked for, or the named
            backend cannot run this.
    """
    from dit_accel.kernels.dense_attention import chunked, flash

    if backend not in PARTIAL_BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(PARTIAL_BACKENDS)}, got {backend!r}")
    _check_partial(q, k, v)
    check_valid(key_valid, k)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("q, k, v: expected no gradient to be asked for: run under torch.no_grad()")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if 0 in (q.shape[2], k.shape[2]):
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=work)
    reason = flash.refuses(q, k, v, key_valid) if backend in ("auto", "flash") else None
    if backend == "flash" and reason is not None:
        raise ValueError(f"backend: expected one that can run here, got 'flash': {reason}")
    if backend == "chunked" or reason is not None:
        return chunked.partial_attention(q, k, v, key_valid, scale)
    return flash.partial_attention(q, k, v, scale)


def _check_partial(q: Tensor, k: Tensor, v: Tensor) -> None:
    if (
        q.ndim != 4
        or k.ndim != 4
        or k.shape != v.shape
        or q.shape[:2] != k.shape[:2]
        or q.shape[3] != k.shape[3]
    ):
        raise ValueError(
            "q, k, v: expected [B, H, Lq, D] and twice [B, H, Lk, D], got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    for what in ("dtype", "device"):
        found = [getattr(x, what) for x in (q, k, v)]
        if len(set(found)) > 1:
            raise ValueError(f"q, k, v: expected one {what}, got {', '.join(map(str, found))}")
    if not q.is_floating_point() or q.dtype.itemsize < 2:
        raise ValueError(f"q, k, v: expected fp16, bf16, fp32 or fp64, got {q.dtype}")
