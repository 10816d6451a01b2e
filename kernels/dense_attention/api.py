"""Dense attention: torch's own, with the mask and the empty rows put right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_summary.api import check_valid


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
