"""Partial dense attention by the flash attention that comes with torch, which tells its lse."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.dense_attention.backends import why_not


def refuses(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None) -> str | None:
    """The reason why it cannot run, or ``None``. Reads no values."""
    if key_valid is not None:
        return "it takes no key mask"
    if q.device.type == "cuda" and q.shape[-1] % 8:
        return f"on CUDA it takes heads of a multiple of 8, got {q.shape[-1]}"
    return why_not("flash", q, k, v)


@torch.no_grad()
def partial_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `dit_accel.kernels.dense_attention.partial_attention`; no row may be empty."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    return out, lse
