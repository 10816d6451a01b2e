"""Token attention in plain torch: time and memory grow with the pairs that are selected.

One head at a time, key block by key block: the queries that chose the block are gathered, and their
online softmax goes on over its keys.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dit_accel.kernels.block_attention.api import RestTerms
from dit_accel.kernels.ragged import WORKSPACE_BYTES, order_of, pick, working_dtype
from dit_accel.kernels.threads import num_workers, run_tasks
from dit_accel.kernels.words import Words


class _Rows:
    """The online softmax of all queries of a head."""

    def __init__(self, query: Tensor) -> None:
        length, depth = query.shape
        self.query = query
        self.peak = query.new_full((length,), -torch.inf)
        self.total = query.new_zeros(length)
        self.numerator = query.new_zeros(length, depth)

    def weigh(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Turn logits ``[n, m]`` of some rows into weights, in place; returns sums ``[n]``."""
        before = self.peak[rows]
        peak = torch.maximum(before, logits.amax(-1))
        finite = peak.masked_fill(peak == -torch.inf, 0.0)
        fade = (before - finite).exp_()
        logits.sub_(finite.unsqueeze(-1)).exp_()
        sums = logits.sum(-1)
        self.peak[rows] = peak
        self.total[rows] = self.total[rows] * fade + sums
        self.numerator[rows] = self.numerator[rows] * fade.unsqueeze(-1)
        return sums

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add to the numerators of some rows."""
        self.numerator.index_add_(0, rows, values)


def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor | Words,
    k_perm: Tensor,
    k_offsets: Tensor,
    key_valid: Tensor | None,
    scale: float,
    rest: RestTerms | None,
) -> tuple[Tensor, Tensor]:
    work = working_dtype(q.dtype)
    batch, heads, length, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=work, device=q.device)
    workers = num_workers(q.device)

    def one_head(b: int, h: int) -> None:
        order = order_of(k_perm, k_offsets, key_valid, b, h)
        chosen = select.select(b, h) if isinstance(select, Words) else pick(select, b, h)
        rows = _Rows(q[b, h].to(work) * scale)
        keys = k[b, h].index_select(0, order.tokens).to(work)
        values = v[b, h].index_select(0, order.tokens).to(work)
        bounds = zip(order.starts.tolist(), order.sizes.tolist(), strict=True)
        for j, (start, size) in enumerate(bounds):
            if size == 0:
                continue
            some_keys, some_values = keys[start : start + size], values[start : start + size]
            step = max(1, WORKSPACE_BYTES // workers // ((size + 3 * q.shape[-1]) * work.itemsize))
            for part in torch.split(chosen[:, j].nonzero().squeeze(-1), step):
                logits = rows.query[part] @ some_keys.mT
                rows.weigh(part, logits)
                rows.add(part, logits @ some_values)
        if rest is not None:
            _add_rest(rows, ~chosen, rest, b, h, WORKSPACE_BYTES // workers)
        norm = rows.total.masked_fill(rows.total == 0, 1.0).unsqueeze(-1)
        out[b, h] = (rows.numerator / norm).to(q.dtype)
        lse[b, h] = rows.total.log() + rows.peak

    with torch.no_grad(), run_tasks(workers) as run:
        run([partial(one_head, b, h) for b in range(batch) for h in range(heads)])
    return out, lse


def _add_rest(
    rows: _Rows, left: Tensor, rest: RestTerms, batch: int, head: int, budget: int
) -> None:
    work = rows.query.dtype
    means, values = rest.k_mean[batch, head].to(work), rest.v_mean[batch, head].to(work)
    count = pick(rest.count, batch, head).to(work)
    step = max(1, budget // (3 * means.shape[0] * work.itemsize))
    for part in torch.split(torch.arange(left.shape[0], device=left.device), step):
        query = rows.query[part]
        logits = query @ means.mT
        if rest.weight != "plain":
            assert rest.k_var is not None
            half = query.square() @ (rest.k_var[batch, head].to(work).mT * 0.5)
            logits += half.log1p() if rest.weight == "second" else half
        logits += torch.where(left[part], count.log(), -torch.inf)
        sums = rows.weigh(part, logits)
        added = logits @ values
        if rest.cov_sum is not None:
            tokens = count[: rest.num_video].sum().clamp(min=1)
            added += (query @ rest.cov_sum[batch, head].to(work)) * (sums / tokens).unsqueeze(-1)
        rows.add(part, added)
