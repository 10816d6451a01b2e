"""The error probe in plain torch: head by head, a chunk of rows at a time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dit_accel.kernels.error_probe.choice import choose_within
from dit_accel.kernels.order import valid_order
from dit_accel.kernels.ragged import WORKSPACE_BYTES, order_of
from dit_accel.kernels.threads import num_workers, run_tasks


def error_probe(
    queries: Tensor,
    k: Tensor,
    log_weight: Tensor,
    perm: Tensor,
    offsets: Tensor,
    num_blocks: int,
    scale: float,
    key_valid: Tensor | None,
) -> Tensor:
    batch, heads, rows, _ = queries.shape
    error = torch.zeros_like(log_weight, dtype=queries.dtype)
    workers = num_workers(k.device)

    def one_head(b: int, h: int) -> None:
        order = order_of(perm, offsets, key_valid, b, h)
        sizes = order.sizes[:num_blocks]
        # read once: how many tokens the blocks hold
        count = int(sizes.sum())
        if count == 0 or rows == 0:
            return
        keys = k[b, h].index_select(0, order.tokens[:count]).to(queries.dtype)
        block = torch.arange(num_blocks, device=k.device)
        block = block.repeat_interleave(sizes, output_size=count)
        step = max(1, WORKSPACE_BYTES // workers // (3 * count * queries.element_size()))
        for first in range(0, rows, step):
            some = slice(first, first + step)
            logits = (queries[b, h, some] * scale) @ keys.mT
            instead = log_weight[b, h, some].to(queries.dtype)
            instead = instead.masked_fill(sizes == 0, -torch.inf)
            peak = torch.maximum(logits.amax(-1, keepdim=True), instead.amax(-1, keepdim=True))
            off = (logits - peak).exp_()
            off.sub_((instead - peak).exp_().index_select(1, block)).abs_()
            error[b, h, some] = off.new_zeros(instead.shape).index_add_(1, block, off)

    with run_tasks(workers) as run:
        run([partial(one_head, b, h) for b in range(batch) for h in range(heads)])
    return error


def error_plan(
    queries: Tensor,
    k: Tensor,
    log_weight: Tensor,
    perm: Tensor,
    offsets: Tensor,
    num_blocks: int,
    scale: float,
    key_valid: Tensor | None,
    density: float,
    all_rows: int,
) -> Tensor:
    batch, heads, rows, _ = queries.shape
    blocks = offsets.shape[-1] - 1
    code = torch.ones(batch, heads, all_rows, blocks, dtype=torch.int8, device=k.device)
    if rows and num_blocks:
        where = (perm, offsets, num_blocks, scale, key_valid)
        error = error_probe(queries, k, log_weight, *where)
        _, bounds = valid_order(perm, offsets, key_valid)
        count = bounds.diff(dim=-1)[..., :num_blocks].long().expand(batch, heads, -1)
        chosen = choose_within(error, count, density)
        code[:, :, :rows, :num_blocks] = torch.where(chosen, 1, -1).to(torch.int8)
    return code
