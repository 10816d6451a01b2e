"""Dense attention: torch's own or another's, with the mask and the empty rows put right."""

from __future__ import annotations

from torch import Tensor

from dit_accel.kernels.block_summary.api import check_valid
from dit_accel.kernels.dense_attention.backends import attend, why_not


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
