"""Selection by gates in plain torch: head by head, by sorting. Reads nothing of the device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.ragged import pick
from dit_accel.kernels.words import Words


def token_select(
    q: Tensor,
    k_mean: Tensor,
    own: Tensor,
    full: Tensor,
    num_video: int,
    text_span: tuple[int, int],
    threshold: float,
    scope: Literal["head", "token"],
    mode: Literal["threshold", "topk"],
) -> Words:
    batch, heads, length, _ = q.shape
    select = torch.ones(batch, heads, length, k_mean.shape[2], dtype=torch.bool, device=q.device)
    places = torch.arange(length, device=q.device)
    tokens = torch.cat([places[: text_span[0]], places[text_span[1] :]])
    if num_video == 0 or tokens.numel() == 0:
        return Words.of(select)
    for b in range(batch):
        for h in range(heads):
            query = q[b, h, tokens].to(k_mean.dtype)
            gate = query @ k_mean[b, h, :num_video].mT
            mine = pick(own, b, h)[tokens]
            some = pick(full, b, h)[:num_video]
            select[b, h, tokens, :num_video] = _choose(gate, mine, some, threshold, scope, mode)
    return Words.of(select)


def _choose(
    gate: Tensor,
    own: Tensor,
    full: Tensor,
    threshold: float,
    scope: Literal["head", "token"],
    mode: Literal["threshold", "topk"],
) -> Tensor:
    """bool ``[n, N]`` for such gates, own blocks ``[n]`` and blocks with keys ``[N]``."""
    chosen = torch.zeros_like(gate, dtype=torch.bool)
    chosen.scatter_(1, own.unsqueeze(1), True)
    low = gate.masked_fill(~full, torch.inf).min()
    gate = gate.masked_fill(~full, -torch.inf)
    gate = (gate - low) / (gate.max() - low).clamp(min=torch.finfo(gate.dtype).tiny)
    gate = gate.masked_fill(~full, -1.0).double()  # -1 marks blocks without a key
    if scope == "head":
        flat = _choose_row(gate.view(1, -1), chosen.view(1, -1), threshold, mode)
        return flat.view(gate.shape)
    return _choose_row(gate, chosen, threshold, mode)


def _choose_row(
    gate: Tensor, own: Tensor, threshold: float, mode: Literal["threshold", "topk"]
) -> Tensor:
    """The best of every row beside its own, until they reach the threshold.

    Args:
        gate: fp64 ``[R, M]`` in [0, 1]; negative where nothing can be chosen.
        own: bool ``[R, M]``, chosen already.
        threshold: share of the row's sum, or of the number of what can be chosen.
        mode: which of the two.
    """
    can = gate >= 0
    worth = gate.clamp(min=0) if mode == "threshold" else can.double()
    wanted = worth.sum(-1, keepdim=True) * threshold
    if mode == "topk":
        wanted = (wanted + 1e-9).floor().clamp(min=1)
    have = (worth * own).sum(-1, keepdim=True)
    order = gate.masked_fill(own, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    value = (worth * ~own).gather(-1, order)
    before = have + value.cumsum(-1) - value
    take = (before < wanted) & can.gather(-1, order) & ~own.gather(-1, order)
    return own | torch.zeros_like(own).scatter_(-1, order, take)
