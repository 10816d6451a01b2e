"""Block attention in plain torch for a GPU: many heads at once, rows padded to the longest.

The host reads the longest block and the longest row, and nothing else. Time and memory grow with
the pairs computed, padding included; a plan whose rows differ much in length wastes some of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_attention.api import POOLED, RestTerms
from dit_accel.kernels.ragged import working_dtype
from dit_accel.kernels.rectangles import (
    WORKSPACE_BYTES,
    gather_blocks,
    rectangles,
    some_heads,
)


class _Keys:
    """Keys and values of some heads by block, and the choice of blocks by row."""

    def __init__(
        self, keys: Tensor, values: Tensor, keep: Tensor, bias: Tensor | None = None
    ) -> None:
        self.shape = keys.shape  # [B, h, N, m, D]
        self.keep = keep.expand(keys.shape[:4])
        self.bias = bias
        self._parts = (keys, values)

    def pooled(self, level: int) -> _Keys:
        """As many valid keys of a block averaged into one, with the log of how many they are."""
        batch, heads, count, size, depth = self.shape
        width = -(-size // level)
        # valid keys first, in their order; padded to whole groups
        order = self.keep.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
        keep = torch.nn.functional.pad(self.keep.gather(-1, order), (0, width * level - size))
        number = keep.view(batch, heads, count, width, level).sum(-1)
        means = []
        for part in self._parts:
            rows = part.gather(3, order.unsqueeze(-1).expand(self.shape))
            rows = torch.nn.functional.pad(rows, (0, 0, 0, width * level - size))
            total = rows.view(batch, heads, count, width, level, depth).sum(-2)
            means.append(total / number.clamp(min=1).unsqueeze(-1))
        return _Keys(means[0], means[1], number > 0, number.to(means[0].dtype).log())

    def of(self, chosen: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys and values of the chosen blocks, ``[B, h, G, most · m, D]``, which to keep, a bias.

        Args:
            chosen: bool ``[B, h, G, N]``.
            most: blocks chosen by the row that has the most.
        """
        batch, heads, count, size, depth = self.shape
        listed, index = chosen.to(torch.int8).sort(dim=-1, descending=True, stable=True)
        listed, index = listed[..., :most], index[..., :most]
        first = torch.arange(batch * heads, device=index.device).view(batch, heads, 1, 1) * count
        flat = (index + first).reshape(-1)
        shape = (*chosen.shape[:3], most * size)
        keys, values = (
            part.reshape(-1, size * depth).index_select(0, flat).view(*shape, depth)
            for part in self._parts
        )
        keep = self.keep.reshape(-1, size).index_select(0, flat).view(*chosen.shape[:3], most, size)
        keep = (keep & listed.bool().unsqueeze(-1)).view(shape)
        if self.bias is None:
            return keys, values, keep, None
        return keys, values, keep, self.bias.reshape(-1, size).index_select(0, flat).view(shape)


@torch.no_grad()
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    code: Tensor,
    *,
    q_perm: Tensor,
    q_offsets: Tensor,
    k_perm: Tensor,
    k_offsets: Tensor,
    key_valid: Tensor | None,
    scale: float,
    rest: RestTerms | None,
) -> tuple[Tensor, Tensor]:
    work = working_dtype(q.dtype)
    batch, heads, length, depth = q.shape
    rows = rectangles(q_perm, q_offsets, None)
    blocks = rectangles(k_perm, k_offsets, key_valid)
    code = code.expand(batch, heads, -1, -1)
    count, width = rows.tokens.shape[2:]
    longest = (code.unsqueeze(-1) == torch.tensor((1, *POOLED), device=code.device)).sum(-2)
    # how many blocks of each level the row with most of them has
    most = dict(zip((1, *POOLED), longest.flatten(0, -2).amax(0).tolist(), strict=True))
    most = {level: count for level, count in most.items() if count} or {1: 1}
    others = 0
    if rest is not None and rest.cov_sum is not None and rest.cov_scope == "rest":
        others = max(1, int((code[..., : rest.num_video] != -1).sum(-1).max()))

    # one place more than tokens: padding is written there
    out = torch.zeros(batch, heads, length + 1, depth, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, length + 1), -torch.inf, dtype=work, device=q.device)
    listed = max(sum(most.values()), others) * blocks.tokens.shape[3]
    cost = listed * (width + 2 * depth + 2) + width * (code.shape[-1] * 2 + 4 * depth)
    at_once = max(1, WORKSPACE_BYTES // (batch * cost * work.itemsize))
    some_rows, step = min(at_once, count), max(1, at_once // count)
    for h in range(0, heads, step):
        these = slice(h, min(h + step, heads))
        whole = _Keys(
            gather_blocks(k, blocks, these, work),
            gather_blocks(v, blocks, these, work),
            some_heads(blocks.keep, these),
        )
        parts = {level: whole if level == 1 else whole.pooled(level) for level in (1, *most)}
        queries = gather_blocks(q, rows, these, work).mul_(scale)
        for first in range(0, count, some_rows):
            span = slice(first, first + some_rows)
            result, norm = _attend(
                queries[:, :, span], parts, code[:, these, span], most, others, rest, these
            )
            where = some_heads(rows.tokens, these)[:, :, span].expand(result.shape[:-1])
            where = where.reshape(batch, result.shape[1], -1)
            norm = norm.reshape(where.shape)
            result = result.reshape(*where.shape, depth).to(q.dtype)
            out[:, these].scatter_(2, where.unsqueeze(-1).expand(-1, -1, -1, depth), result)
            lse[:, these].scatter_(2, where, norm)
    return out[:, :, :length], lse[:, :, :length]


def _attend(
    query: Tensor,
    keys: dict[int, _Keys],
    code: Tensor,
    most: dict[int, int],
    others: int,
    rest: RestTerms | None,
    heads: slice,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` ``[B, h, G, n]`` of scaled queries ``[B, h, G, n, D]``."""
    all_logits, all_values = [], []
    for level, count in most.items():
        chosen_keys, some_values, keep, bias = keys[level].of(code == level, count)
        some = query @ chosen_keys.mT
        if bias is not None:
            some += bias.unsqueeze(-2)
        all_logits.append(some.masked_fill_(~keep.unsqueeze(-2), -torch.inf))
        all_values.append(some_values)
    logits = all_logits[0] if len(all_logits) == 1 else torch.cat(all_logits, -1)
    values = all_values[0] if len(all_values) == 1 else torch.cat(all_values, -2)
    peak = logits.amax(-1, keepdim=True)
    approximate = None
    if rest is not None:
        approximate = _rest_logits(query, code == -1, rest, heads)
        peak = torch.maximum(peak, approximate.amax(-1, keepdim=True))
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    logits.sub_(peak).exp_()
    total = logits.sum(-1, keepdim=True)
    numerator = logits @ values
    del logits, values, all_logits, all_values
    if rest is not None and approximate is not None:
        weights = approximate.sub_(peak).exp_()
        share = weights.sum(-1, keepdim=True)
        numerator += weights @ rest.v_mean[:, heads].to(query.dtype).unsqueeze(2)
        numerator += _first_order(query, keys[1], code, others, rest, heads, share)
        total += share
    out = numerator.div_(total.masked_fill(total == 0, 1.0))
    return out, total.log().add_(peak).squeeze(-1)


def _rest_logits(query: Tensor, chosen: Tensor, rest: RestTerms, heads: slice) -> Tensor:
    """``[B, h, G, n, N]``: logarithms of the weights of the blocks left to the rest."""
    logits = query @ rest.k_mean[:, heads].to(query.dtype).mT.unsqueeze(2)
    if rest.weight != "plain":
        assert rest.k_var is not None
        half = rest.k_var[:, heads].to(query.dtype).mT.unsqueeze(2) * 0.5
        shift = query.square() @ half
        logits += shift.log1p_() if rest.weight == "second" else shift
    log_count = some_heads(rest.count, heads).to(query.dtype).log().unsqueeze(2)
    return logits.add_(torch.where(chosen, log_count, -torch.inf).unsqueeze(-2))


def _first_order(
    query: Tensor,
    keys: _Keys,
    code: Tensor,
    others: int,
    rest: RestTerms,
    heads: slice,
    share: Tensor,
) -> Tensor | float:
    """What PISA's first-order term adds to the numerator, ``[B, h, G, n, D]``."""
    if rest.cov_sum is None:
        return 0.0
    cov = rest.cov_sum[:, heads].to(query.dtype).unsqueeze(2)
    count = some_heads(rest.count, heads).to(query.dtype).unsqueeze(2)
    if rest.cov_scope == "global":
        tokens = count[..., : rest.num_video].sum(-1)
    else:
        video = torch.arange(code.shape[-1], device=code.device) < rest.num_video
        means = rest.k_mean[:, heads].to(query.dtype)
        centred = _Keys(keys._parts[0] - means.unsqueeze(-2), keys._parts[1], keys.keep)
        other_keys, other_values, keep, _ = centred.of((code != -1) & video, others)
        other_keys = other_keys.masked_fill(~keep.unsqueeze(-1), 0.0)
        cov = cov - other_keys.mT @ other_values
        tokens = ((code == -1) * count).sum(-1)
    return (query @ cov) * (share / tokens.clamp(min=1)[..., None, None])
