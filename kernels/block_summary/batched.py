"""The block statistics in plain torch for a GPU: many heads at once, without reading the device."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_summary.api import BlockSummary
from dit_accel.kernels.ragged import working_dtype
from dit_accel.kernels.rectangles import (
    WORKSPACE_BYTES,
    Rectangles,
    gather_blocks,
    rectangles,
    some_heads,
)


def _steps(x: Tensor, blocks: Rectangles, copies: int) -> list[slice]:
    """Heads to take at once, so that some copies of their padded tokens fit the workspace."""
    batch, heads, _, depth = x.shape
    cells = blocks.tokens.shape[2] * blocks.tokens.shape[3]
    step = max(1, WORKSPACE_BYTES // (copies * batch * cells * depth * 4))
    return [slice(h, min(h + step, heads)) for h in range(0, heads, step)]


@torch.no_grad()
def block_mean(x: Tensor, perm: Tensor, offsets: Tensor, valid: Tensor | None) -> Tensor:
    blocks, work = rectangles(perm, offsets, valid), working_dtype(x.dtype)
    means = []
    for heads in _steps(x, blocks, 2):
        count = some_heads(blocks.keep, heads).sum(-1).clamp_(min=1)
        rows = gather_blocks(x, blocks, heads, work)
        means.append(rows.sum(-2).div_(count.unsqueeze(-1)))
    return torch.cat(means, 1)


@torch.no_grad()
def block_summary(
    k: Tensor,
    v: Tensor,
    perm: Tensor,
    offsets: Tensor,
    num_video: int,
    key_valid: Tensor | None,
    want_var: bool,
    want_cov: bool,
) -> BlockSummary:
    blocks, work = rectangles(perm, offsets, key_valid), working_dtype(k.dtype)
    batch, _, _, depth = k.shape
    k_mean, v_mean, k_var, cov_sum, cov_norm = [], [], [], [], []
    for heads in _steps(k, blocks, 4):
        keep = some_heads(blocks.keep, heads).unsqueeze(-1)
        by = keep.sum(-2).clamp_(min=1)
        keys = gather_blocks(k, blocks, heads, work)
        values = gather_blocks(v, blocks, heads, work)
        means = keys.sum(-2).div_(by)
        k_mean.append(means)
        v_mean.append(values.sum(-2).div_(by))
        if want_var or want_cov:
            keys = keys.sub_(means.unsqueeze(-2)).masked_fill_(~keep, 0)
        if want_cov:
            norm = keys.new_zeros(keys.shape[:3])
            total = keys.new_zeros(*keys.shape[:2], depth, depth)
            step = max(
                1, WORKSPACE_BYTES // (batch * keys.shape[1] * depth * depth * work.itemsize)
            )
            for first in range(0, keys.shape[2], step):
                some = slice(first, first + step)
                cov = keys[:, :, some].mT @ values[:, :, some]
                norm[:, :, some] = torch.linalg.vector_norm(cov, dim=(-2, -1))
                total += cov[:, :, : max(0, num_video - first)].sum(2)
            cov_norm.append(norm)
            cov_sum.append(total)
        if want_var:
            k_var.append(keys.square_().sum(-2).div_(by))

    def joined(parts: list[Tensor]) -> Tensor | None:
        return torch.cat(parts, 1) if parts else None

    return BlockSummary(
        blocks.keep.sum(-1),
        torch.cat(k_mean, 1),
        torch.cat(v_mean, 1),
        joined(k_var),
        joined(cov_sum),
        joined(cov_norm),
    )
