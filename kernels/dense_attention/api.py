"""Dense attention: torch's own or another's, with the mask and the empty rows put right."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dit_accel.kernels.block_summary.api import check_valid
from dit_accel.kernels.dense_attention.backends import attend, why_not

PARTIAL_BACKENDS: Final = ("auto", "flash3", "xformers", "flash", "chunked")
"""Of partial attention: ``flash3``, FlashAttention-3; ``xformers``; ``flash``, torch's own flash
attention; and ``chunked``, plain torch, anywhere, fp32 inside."""


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """``softmax(scale · q kᵀ) v`` over the valid keys.

    Args:
        q, k, v: ``[B, H, L, D]``.
        key_valid: bool ``[B, L]``; ``False`` keys are left out. ``None`` keeps torch's fast path.
            Backends other than ``"sdpa"`` read it on the host, and gather the valid keys unless
            they come first.
        scale: of the logits; ``D ** -0.5`` by default.
        backend: a name from `dit_accel.kernels.dense_attention.BACKENDS`; never another one.

    Returns:
        ``[B, H, L, D]`` in the inputs' dtype; zero for a batch element without any valid key.

    Raises:
        ValueError: the backend cannot run this, with the reason.
    """
    check_valid(key_valid, k)
    reason = why_not(backend, q, k, v)
    if reason is not None:
        raise ValueError(f"backend: expected one that can run this, got {backend!r}: {reason}")
    return attend(backend, q, k, v, key_valid, scale)


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
        backend: one of `PARTIAL_BACKENDS`. ``"auto"`` is the first of ``"flash3"`` and
            ``"xformers"`` (where they are installed, on CUDA), ``"flash"`` (on CUDA fp16 or bf16,
            ``D`` a multiple of 8 up to 256) and ``"chunked"`` that can run; with a key mask it is
            the last. A named one never falls back.

    Returns:
        ``out`` ``[B, H, Lq, D]`` in ``q``'s dtype; ``lse`` ``[B, H, Lq]``, natural log, in fp32
        (fp64 for fp64). A row without any key is ``(0, -inf)``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, gradients are asked for, or the named
            backend cannot run this.
    """
    from dit_accel.kernels.dense_attention import chunked, flash, flash3, xformers_ops

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
    choices = {
        "flash3": (flash3.refuses, flash3.partial_attention),
        "xformers": (xformers_ops.refuses, xformers_ops.partial_attention),
        "flash": (flash.refuses, flash.partial_attention),
    }
    for name, (refuses, run) in choices.items():
        if backend not in ("auto", name):
            continue
        reason = refuses(q, k, v, key_valid)
        if reason is None:
            return run(q, k, v, scale)
        if backend == name:
            raise ValueError(f"backend: expected one that can run here, got {name!r}: {reason}")
    return chunked.partial_attention(q, k, v, key_valid, scale)


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
