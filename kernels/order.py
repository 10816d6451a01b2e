"""Orders of tokens for kernels on a GPU: all heads at once, and nothing read by the host."""

from __future__ import annotations

import torch
from torch import Tensor


def lead_strides(tensor: Tensor) -> tuple[int, int]:
    """Strides of the first two dimensions, 0 where one is 1 and so stands for all."""
    return (
        tensor.stride(0) if tensor.shape[0] > 1 else 0,
        tensor.stride(1) if tensor.shape[1] > 1 else 0,
    )


def valid_order(perm: Tensor, offsets: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """An order and its blocks with the padding moved behind them.

    Args:
        perm: int64 ``[B|1, H|1, L]``.
        offsets: integer ``[B|1, H|1, N + 1]``.
        valid: bool ``[B, L]`` by token, or ``None`` when every token is.

    Returns:
        ``tokens`` int64 ``[B|1, H|1, L]``, the valid ones in their order and then the others, and
        ``bounds`` int32 ``[B|1, H|1, N + 1]``, where the blocks lie in it.
    """
    if valid is None:
        return perm, offsets if offsets.dtype == torch.int32 else offsets.to(torch.int32)
    batch, heads, length = valid.shape[0], *perm.shape[1:]
    perm = perm.expand(batch, heads, length)
    keep = valid.unsqueeze(1).expand(batch, heads, length).gather(2, perm)
    before = torch.nn.functional.pad(keep.cumsum(-1), (1, 0))
    count = before[..., -1:]
    place = torch.arange(length, device=perm.device)
    target = torch.where(keep, before[..., :-1], count + place - before[..., :-1])
    tokens = torch.empty_like(target).scatter_(2, target, perm)
    heads = max(heads, offsets.shape[1])
    before = before.expand(batch, heads, -1)
    bounds = before.gather(2, offsets.long().expand(batch, heads, -1))
    return tokens, bounds.to(torch.int32)
