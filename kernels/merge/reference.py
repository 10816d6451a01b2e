"""The merge in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    peak = torch.maximum(lse, other_lse)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weight, other_weight = (lse - peak).exp_(), (other_lse - peak).exp_()
    total = weight + other_weight
    merged = out.to(lse.dtype) * weight.unsqueeze(-1)
    merged.addcmul_(other.to(lse.dtype), other_weight.unsqueeze(-1))
    merged.div_(total.masked_fill(total == 0, 1.0).unsqueeze(-1))
    return merged.to(out.dtype), total.log_().add_(peak)
