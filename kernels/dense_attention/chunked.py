"""Partial dense attention in plain torch: some queries of some heads against all keys at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels import ragged, rectangles
from dit_accel.kernels.ragged import Workspace, working_dtype


@torch.no_grad()
def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `dit_accel.kernels.dense_attention.partial_attention`."""
    work = working_dtype(q.dtype)
    batch, heads, length, _ = q.shape
    budget = ragged.WORKSPACE_BYTES if q.device.type == "cpu" else rectangles.WORKSPACE_BYTES
    at_once = max(1, budget // (k.shape[2] * work.itemsize))
    some_heads, rows = max(1, min(heads, at_once // length)), min(length, at_once)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, length, dtype=work, device=q.device)
    space = Workspace(work, q.device)
    for b in range(batch):
        left_out = None if key_valid is None else ~key_valid[b]
        for h in range(0, heads, some_heads):
            these = slice(h, h + some_heads)
            keys, values = k[b, these].to(work).mT, v[b, these].to(work)
            if left_out is not None:
                # what padding holds may be NaN, which a weight of 0 would not stop
                values = values.masked_fill(left_out.unsqueeze(-1), 0.0)
            for first in range(0, length, rows):
                span = slice(first, first + rows)
                queries = q[b, these, span].to(work) * scale
                logits = space.take("logits", *queries.shape[:2], keys.shape[-1])
                torch.matmul(queries, keys, out=logits)
                if left_out is not None:
                    logits.masked_fill_(left_out, -torch.inf)
                peak = logits.amax(-1, keepdim=True)
                peak.masked_fill_(peak == -torch.inf, 0.0)
                total = logits.sub_(peak).exp_().sum(-1, keepdim=True)
                result = logits @ values
                out[b, these, span] = result.div_(total.masked_fill(total == 0, 1.0)).to(q.dtype)
                lse[b, these, span] = total.log_().add_(peak).squeeze(-1)
    return out, lse
