"""Dense attention by xformers, whole or as a partial. It is imported when it is used."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def why_not(
    q: Tensor | None, k: Tensor | None, v: Tensor | None, *, partial: bool = False
) -> str | None:
    """The reason why it cannot run here, or on these tensors ``[B, H, L, D]``, in its own words."""
    if find_spec("xformers") is None:
        return "xformers is not installed: pip install xformers"
    if not torch.cuda.is_available():
        return "needs a CUDA device, and there is none"
    if q is not None and q.device.type != "cuda":
        return f"needs tensors on a CUDA device, got {q.device}"
    from xformers.ops import fmha

    if q is None or k is None or v is None:
        if any(op.is_available() for op in fmha.ALL_FW_OPS):
            return None
        return "this build of xformers has no operator for this torch (see python -m xformers.info)"
    inputs = fmha.Inputs(*(_by_token(x) for x in (q, k, v)), is_partial=partial)
    found = {op.NAME: op.not_supported_reasons(inputs) for op in fmha.ALL_FW_OPS}
    if not all(found.values()):
        return None
    return "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in found.items())


def refuses(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None) -> str | None:
    """The reason why no partial can be had from it, or ``None``. Reads no values."""
    return "it takes no key mask" if key_valid is not None else why_not(q, k, v, partial=True)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Softmax attention ``[B, H, Lq, D]``."""
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(*(_by_token(x) for x in (q, k, v)), scale=scale)
    return out.transpose(1, 2)


@torch.no_grad()
def partial_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `dit_accel.kernels.dense_attention.partial_attention`; no row may be empty."""
    from xformers.ops.fmha import memory_efficient_attention_partial

    out, lse = memory_efficient_attention_partial(*(_by_token(x) for x in (q, k, v)), scale=scale)
    # some operators pad the queries of the normalisers
    return out.transpose(1, 2), lse[..., : q.shape[2]]


def _by_token(x: Tensor) -> Tensor:
    """``[B, L, H, D]``, as xformers has it."""
    return x.transpose(1, 2)
