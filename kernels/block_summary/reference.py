"""The block statistics in plain torch: a chunk of blocks at a time, padded to its longest."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dit_accel.kernels.block_summary.api import BlockSummary
from dit_accel.kernels.ragged import (
    WORKSPACE_BYTES,
    Order,
    chunks,
    order_of,
    pad_rows,
    positions,
    working_dtype,
)
from dit_accel.kernels.threads import num_workers, run_tasks


def _rectangles(
    order: Order, cost_per_token: int, budget: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Non-empty blocks, in chunks: block ids, token ids ``[G, n]``, padding mask, sizes."""
    sizes, ids = order.sizes.sort(stable=True)
    ids, sizes = ids[sizes > 0], sizes[sizes > 0]
    for first, last in chunks(sizes.tolist(), cost_per_token, budget):
        some = ids[first:last]
        where = positions(order.starts[some], sizes[first:last])
        tokens, padding = pad_rows(order.tokens[where], sizes[first:last])
        yield some, tokens, padding, sizes[first:last]


def _gather(x: Tensor, tokens: Tensor, padding: Tensor | None) -> Tensor:
    """``[G, n, D]`` in the working dtype, zero on padding."""
    rows = x.index_select(0, tokens.reshape(-1)).to(working_dtype(x.dtype))
    rows = rows.view(*tokens.shape, -1)
    return rows if padding is None else rows.masked_fill_(padding.unsqueeze(-1), 0)


@torch.no_grad()
def block_mean(x: Tensor, perm: Tensor, offsets: Tensor, valid: Tensor | None) -> Tensor:
    batch, heads, _, width = x.shape
    work = working_dtype(x.dtype)
    mean = torch.zeros(batch, heads, offsets.shape[-1] - 1, width, dtype=work, device=x.device)
    workers = num_workers(x.device)

    def one_head(b: int, h: int) -> None:
        order = order_of(perm, offsets, valid, b, h)
        cost = 2 * width * mean.itemsize
        for ids, tokens, padding, sizes in _rectangles(order, cost, WORKSPACE_BYTES // workers):
            rows = _gather(x[b, h], tokens, padding)
            mean[b, h, ids] = rows.sum(1).div_(sizes.unsqueeze(1))

    with run_tasks(workers) as run:
        run([partial(one_head, b, h) for b in range(batch) for h in range(heads)])
    return mean


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
    batch, heads, _, width = k.shape
    blocks = offsets.shape[-1] - 1
    work = working_dtype(k.dtype)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, heads, *shape, dtype=work, device=k.device)

    k_mean, v_mean = zeros(blocks, width), zeros(blocks, width)
    k_var = zeros(blocks, width) if want_var else None
    cov_sum = zeros(width, width) if want_cov else None
    cov_norm = zeros(blocks) if want_cov else None
    by_head = perm.shape[1] > 1 or offsets.shape[1] > 1
    by_batch = key_valid is not None or perm.shape[0] > 1 or offsets.shape[0] > 1
    count = torch.zeros(batch, heads, blocks, dtype=torch.int64, device=k.device)
    workers = num_workers(k.device)

    def one_head(b: int, h: int) -> None:
        order = order_of(perm, offsets, key_valid, b, h)
        count[b, h] = order.sizes
        # for each token: keys, values, each gathered and converted; a C_j spread over its tokens
        cost = 4 * width * work.itemsize
        if want_cov:
            usual = max(1, order.tokens.numel() // max(1, blocks))
            cost += width * width * work.itemsize // usual
        for ids, tokens, padding, sizes in _rectangles(order, cost, WORKSPACE_BYTES // workers):
            keys = _gather(k[b, h], tokens, padding)
            values = _gather(v[b, h], tokens, padding)
            by = sizes.unsqueeze(1)
            means = keys.sum(1).div_(by)
            k_mean[b, h, ids] = means
            v_mean[b, h, ids] = values.sum(1).div_(by)
            if k_var is None and not want_cov:
                continue
            keys.sub_(means.unsqueeze(1))
            if padding is not None:
                keys.masked_fill_(padding.unsqueeze(-1), 0)
            if cov_sum is not None and cov_norm is not None:
                cov = torch.bmm(keys.transpose(1, 2), values)
                cov_norm[b, h, ids] = torch.linalg.vector_norm(cov, dim=(1, 2))
                cov_sum[b, h] += cov.mul_((ids < num_video).view(-1, 1, 1)).sum(0)
            if k_var is not None:
                k_var[b, h, ids] = keys.square_().sum(1).div_(by)

    with run_tasks(workers) as run:
        run([partial(one_head, b, h) for b in range(batch) for h in range(heads)])
    count = count[: batch if by_batch else 1, : heads if by_head else 1]
    return BlockSummary(count, k_mean, v_mean, k_var, cov_sum, cov_norm)
