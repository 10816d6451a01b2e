"""Norms and rotary embedding in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.kernels.norm_rotary.api import Stream
from dit_accel.kernels.ragged import working_dtype


@torch.no_grad()
def norm_rotary(
    streams: Sequence[Stream],
    norm: str | None,
    cos: Tensor | None,
    sin: Tensor | None,
    dtype: torch.dtype,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    start = 0
    for stream in streams:
        stop = start + stream.q.shape[1]
        angles = None
        if cos is not None and sin is not None and stop <= cos.shape[0]:
            angles = cos[start:stop], sin[start:stop]
        for made, x, weight, eps in (
            (queries, stream.q, stream.q_weight, stream.q_eps),
            (keys, stream.k, stream.k_weight, stream.k_eps),
        ):
            made.append(_turned(_normed(x, weight, eps, norm), angles).to(dtype))
        start = stop
    q, k, v = (torch.cat(parts, 1) for parts in (queries, keys, [one.v for one in streams]))
    if order is not None:
        q, k, v = (x.index_select(1, order) for x in (q, k, v))
    elif len(streams) == 1:
        v = streams[0].v
    return q, k, v


def _normed(x: Tensor, weight: Tensor | None, eps: float, norm: str | None) -> Tensor:
    work = x.to(working_dtype(x.dtype))
    if norm is None:
        return work
    over = -1 if norm == "head" else (-2, -1)
    work = work * torch.rsqrt(work.square().mean(over, keepdim=True) + eps)
    if weight is None:
        return work
    return work * weight.to(work.dtype).view(-1, x.shape[-1])


def _turned(x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    if angles is None:
        return x
    even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = (one.to(x.dtype).unsqueeze(1) for one in angles)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
