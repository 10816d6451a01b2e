"""The plan in plain torch, some heads at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.pooled_topk.api import share_of
from dit_accel.kernels.topk import topk_mask

_CHUNK_BYTES = 32 * 2**20


def pooled_topk(
    q_mean: Tensor,
    k_mean: Tensor,
    count: Tensor,
    norm: Tensor | None,
    rows: int,
    columns: int,
    scale: float,
    density: float,
) -> Tensor:
    batch, heads, blocks, _ = k_mean.shape
    code = torch.full(
        (batch, heads, q_mean.shape[2], blocks), 1, dtype=torch.int8, device=q_mean.device
    )
    if not (rows and columns):
        return code
    query, key = q_mean[:, :, :rows] * scale, k_mean[:, :, :columns]
    count = count[..., :columns].expand(batch, heads, -1)
    shift = torch.zeros((), dtype=key.dtype, device=key.device).expand(count.shape)
    if norm is not None:
        shift = (norm[:, :, :columns] + 1e-5).log()
    shift = shift.masked_fill(count == 0, -torch.inf)
    # a few heads at a time: the scores of all would be as large as a tensor of tokens
    step = max(1, _CHUNK_BYTES // (batch * rows * columns * key.itemsize))
    for h in range(0, heads, step):
        some = slice(h, h + step)
        score = query[:, some] @ key[:, some].mT
        score += shift[:, some].unsqueeze(-2)
        wanted = share_of((count[:, some] > 0).sum(-1), density)
        chosen = topk_mask(score, wanted)
        code[:, some, :rows, :columns] = torch.where(chosen, 1, -1).to(torch.int8)
    return code
