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


def label_order(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by label, those of one label in their own order.

    Args:
        labels: integer ``[B, H, L]``, below ``clusters``.
        clusters: ``C``.

    Returns:
        ``perm`` int64 ``[B, H, L]`` and ``offsets`` int32 ``[B, H, C + 1]``.
    """
    batch, heads, length = labels.shape
    keys, order = sorted_labels(labels.reshape(-1, length), clusters)
    bounds = label_bounds(keys, batch * heads, clusters)
    first = torch.arange(batch * heads, device=labels.device).unsqueeze(1) * length
    offsets = torch.cat([bounds[:-1].view(-1, clusters), first + length], 1) - first
    return (
        (order.view(-1, length) - first).view(labels.shape),
        offsets.to(torch.int32).view(batch, heads, clusters + 1),
    )


def sorted_labels(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """One stable sort of all heads: labels made distinct by head ``[G · L]``, and places in it.

    Args:
        labels: integer ``[G, L]``, below ``clusters``.
        clusters: ``C``; ``G · C`` below 2**31.
    """
    first = torch.arange(labels.shape[0], dtype=torch.int32, device=labels.device) * clusters
    keys, order = (labels.to(torch.int32) + first.unsqueeze(1)).view(-1).sort(stable=True)
    return keys, order


def label_bounds(keys: Tensor, groups: int, clusters: int) -> Tensor:
    """int64 ``[G · C + 1]``: where each label of each head begins among the sorted ones."""
    wanted = torch.arange(groups * clusters + 1, dtype=torch.int32, device=keys.device)
    return torch.searchsorted(keys, wanted)
