"""Blocks of unequal length as rectangles of all heads at once, for plain torch on a GPU.

There a loop over heads, or a length read by the host, costs more than padding does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 512 * 2**20
"""What one chunk may take."""


class Rectangles(NamedTuple):
    """The tokens of every block, padded to the longest.

    ``tokens`` int64 ``[B|1, H|1, N, m]``, ``L`` (one past the last) on padding; ``keep`` bool of
    that shape, ``False`` on padding and on tokens that are not valid.
    """

    tokens: Tensor
    keep: Tensor


def rectangles(perm: Tensor, offsets: Tensor, valid: Tensor | None) -> Rectangles:
    """Cut an order into rectangles. Reads one number from the device: the longest block.

    Args:
        perm: int64 ``[B|1, H|1, L]``.
        offsets: integer ``[B|1, H|1, N + 1]``.
        valid: bool ``[B, L]`` by token, or ``None`` when every token is.
    """
    length = perm.shape[-1]
    batch, heads = (max(a, b) for a, b in zip(perm.shape[:2], offsets.shape[:2], strict=True))
    perm = perm.expand(batch, heads, -1)
    bounds = offsets.long().expand(batch, heads, -1)
    width = max(1, int(bounds.diff(dim=-1).max()))
    where = bounds[..., :-1, None] + torch.arange(width, device=perm.device)
    keep = where < bounds[..., 1:, None]
    flat = where.clamp(max=length - 1).view(batch, heads, -1)
    tokens = perm.gather(2, flat).view(where.shape).masked_fill_(~keep, length)
    if valid is not None:
        padded = torch.cat([valid, valid.new_zeros(valid.shape[0], 1)], 1)
        flat = tokens.expand(valid.shape[0], -1, -1, -1).reshape(valid.shape[0], -1)
        keep = padded.gather(1, flat).view(valid.shape[0], *tokens.shape[1:])
    return Rectangles(tokens, keep)


def some_heads(tensor: Tensor, heads: slice) -> Tensor:
    """``tensor[:, heads]``, where the second dimension may be 1."""
    return tensor if tensor.shape[1] == 1 else tensor[:, heads]


def gather_blocks(x: Tensor, blocks: Rectangles, heads: slice, dtype: torch.dtype) -> Tensor:
    """Tokens by block, ``[B, h, N, m, D]``, zero where they are not kept.

    Args:
        x: ``[B, H, L, D]``.
        blocks: of all heads.
        heads: which of them.
        dtype: of the result.
    """
    some = x[:, heads]
    batch, count, length, depth = some.shape
    tokens = some_heads(blocks.tokens, heads).clamp(max=length - 1)
    shape = (batch, count, *tokens.shape[2:])
    index = tokens.expand(shape).reshape(batch, count, -1, 1).expand(-1, -1, -1, depth)
    rows = some.gather(2, index).to(dtype).view(*shape, depth)
    return rows.masked_fill_(~some_heads(blocks.keep, heads).unsqueeze(-1), 0)
