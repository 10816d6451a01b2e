"""Block importance in plain torch: head by head, a chunk of queries at a time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dit_accel.kernels.ragged import WORKSPACE_BYTES, pick, working_dtype
from dit_accel.kernels.threads import num_workers, run_tasks


def block_importance(
    q: Tensor,
    k: Tensor,
    q_tokens: Tensor,
    q_bounds: Tensor,
    k_tokens: Tensor,
    k_bounds: Tensor,
    scale: float,
    k_longest: int | None = None,
) -> Tensor:
    work = working_dtype(q.dtype)
    batch, heads = q.shape[:2]
    rows, columns = q_bounds.shape[-1] - 1, k_bounds.shape[-1] - 1
    importance = torch.zeros(batch, heads, rows, columns, dtype=work, device=q.device)
    workers = num_workers(q.device)

    def one_head(b: int, h: int) -> None:
        query, row = _sampled(q[b, h], pick(q_tokens, b, h), pick(q_bounds, b, h), work)
        key, column = _sampled(k[b, h], pick(k_tokens, b, h), pick(k_bounds, b, h), work)
        if key.shape[0] == 0:
            return
        query = query * scale
        step = max(1, WORKSPACE_BYTES // workers // (key.shape[0] * 2 * key.element_size()))
        for first in range(0, query.shape[0], step):
            some = slice(first, first + step)
            share = (query[some] @ key.mT).softmax(-1)
            by_block = share.new_zeros(share.shape[0], columns).index_add_(1, column, share)
            importance[b, h].index_add_(0, row[some], by_block)

    with run_tasks(workers) as run:
        run([partial(one_head, b, h) for b in range(batch) for h in range(heads)])
    return importance


def _sampled(x: Tensor, tokens: Tensor, bounds: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sampled rows ``[M, D]`` of ``x``, and the block ``[M]`` that each is of."""
    count = int(bounds[-1])
    sizes = bounds.long().diff()
    block = torch.arange(sizes.numel(), device=x.device)
    block = block.repeat_interleave(sizes, output_size=count)
    return x.index_select(0, tokens[:count]).to(work), block
