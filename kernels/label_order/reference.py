"""The order in plain torch: one stable sort of all heads. Nothing is read by the host."""

from __future__ import annotations

import torch
from torch import Tensor


def label_order(
    labels: Tensor, clusters: int, text: tuple[int, int], text_block: int
) -> tuple[Tensor, Tensor]:
    start, stop = text
    lead, device = labels.shape[:2], labels.device
    keys, cells = labels.sort(dim=-1, stable=True)
    number = torch.arange(clusters + 1, dtype=keys.dtype, device=device)
    bounds = torch.searchsorted(keys, number.expand(*lead, -1).contiguous())
    tokens = torch.where(cells < start, cells, cells + (stop - start))
    words = torch.arange(start, stop, device=device).expand(*lead, -1)
    # made where it is used: a copy from the host would wait for the device
    number = torch.arange(1, -(-(stop - start) // text_block) + 1, device=device)
    ends = (number * text_block).clamp(max=stop - start) + labels.shape[-1]
    offsets = torch.cat([bounds, ends.expand(*lead, -1)], -1)
    return torch.cat([tokens, words], -1), offsets.to(torch.int32)
