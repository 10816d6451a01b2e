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


_CHUNK_BYTES = 64 * 2**20


def dense_partial(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over keys that are only some of all, with the normaliser that merging needs.

    In chunks of queries: the logits never take more than 64 MiB, or what one query's take. They are
    computed from fp32 copies of the keys and values (fp64 for fp64).

    Args:
        q: ``[B, H, L, D]``.
        k, v: ``[B, H, M, D]``, the same dtype.
        scale: of the logits; ``D ** -0.5`` by default.

    Returns:
        ``out`` ``[B, H, L, D]`` in ``q``'s dtype, and ``lse`` ``[B, H, L]``, the natural log of the
        sum of the exponentials, in fp32 (fp64 for fp64).

    Raises:
        ValueError: the shapes or dtypes do not fit each other, or there is no key.
    """
    same = (*q.shape[:2], k.shape[2], q.shape[3])
    if q.ndim != 4 or k.shape != same or v.shape != same or not k.shape[2]:
        raise ValueError(
            "dense_partial: expected q [B, H, L, D] with k and v [B, H, M, D], M > 0, got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"dense_partial: expected one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=work)
    k, v = k.to(work), v.to(work)
    row = q.shape[0] * q.shape[1] * k.shape[2] * work.itemsize
    step = max(1, _CHUNK_BYTES // row)
    for first in range(0, q.shape[2], step):
        some = slice(first, first + step)
        logits = (q[:, :, some].to(work) @ k.mT).mul_(scale)
        lse[:, :, some] = logits.logsumexp(-1)
        out[:, :, some] = logits.softmax(-1) @ v
    return out, lse
