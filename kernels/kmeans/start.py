"""Where k-means begins, the same for every implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.ragged import working_dtype


def starting_centroids(x: Tensor, clusters: int, valid: Tensor | None, seed: int) -> Tensor:
    """``[B, H, C, D]`` fp32 (fp64): tokens drawn alike for every head, valid ones before others.

    Args:
        x: ``[B, H, L, D]``.
        clusters: ``C``.
        valid: bool ``[B, L]``, or ``None``.
        seed: of the draw, which is made on the CPU and so the same on every device.
    """
    batch, heads, length, depth = x.shape
    draw = torch.rand(length, generator=torch.Generator().manual_seed(seed)).to(x.device)
    keys = draw.unsqueeze(0) if valid is None else draw + valid
    chosen = keys.topk(clusters, dim=-1).indices.expand(batch, clusters)
    index = chosen[:, None, :, None].expand(batch, heads, clusters, depth)
    centres = x.gather(2, index).to(working_dtype(x.dtype))
    if valid is not None:  # padding may hold anything
        kept = valid.gather(1, chosen)[:, None, :, None]
        centres = centres.masked_fill(~kept, 0.0)
    return centres.contiguous()
