"""What is made of projections before attention: norms and rotary embedding, where a kernel can."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch

from dit_accel.kernels.backends import resolve
from dit_accel.kernels.norm_rotary import KNOWN, Stream, norm_rotary, refusal

__all__ = ["Over", "Stream", "norm_rotary", "why_not_kernel"]
Over = Literal["head", "token"]
"""What a norm is over: each head's channels, or all channels of a token."""


@lru_cache(maxsize=64)
def why_not_kernel(
    device: str, dtype: torch.dtype, heads: int, depth: int, over: Over | None, *, named: bool
) -> str | None:
    """Why the kernel of `norm_rotary` does not take projections ``[B, L, H, D]``, if it does not.

    Args:
        device, dtype, heads, depth: theirs.
        over: of the norms; ``None`` without norms.
        named: whether it was asked for by name, rather than left to choose.
    """
    like = torch.empty((0, 0, heads, depth), dtype=dtype, device=device)
    reason = refusal(like, over)
    if reason is None and not named and resolve("auto", like, KNOWN) != "triton":
        return "it is for head sizes of 64 and 128 on a GPU, unless it is named"
    return reason
