"""The count in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.words import Words, bit_of, grouping

_CHUNK_BYTES = 32 * 2**20


def pair_count(code: Tensor | Words, keys: Tensor, queries: Tensor | None) -> Tensor:
    if isinstance(code, Words):
        return _of_words(code, keys)
    given = [code, keys] if queries is None else [code, keys, queries]
    batch, heads = (max(x.shape[axis] for x in given) for axis in (0, 1))
    code = code.expand(batch, heads, -1, -1)
    keys = keys.expand(batch, heads, -1)
    if queries is not None:
        queries = queries.expand(batch, heads, -1)
    found = torch.empty(batch, heads, dtype=torch.int64, device=code.device)
    if found.numel() == 0 or code[0, 0].numel() == 0:
        return found.zero_()
    # some heads at a time; a row's keys are below 2**24 in practice, and counted exactly in fp64
    step = max(1, _CHUNK_BYTES // (8 * batch * code[0, 0].numel()))
    for h in range(0, heads, step):
        some = slice(h, h + step)
        each = ((code[:, some] == 1).double() @ keys[:, some].double().unsqueeze(-1)).squeeze(-1)
        if queries is not None:
            each = each * queries[:, some]
        found[:, some] = each.sum(-1).long()
    return found


def _of_words(words: Words, keys: Tensor) -> Tensor:
    _, size = grouping(words.blocks)
    found: Tensor = keys.new_zeros((), dtype=torch.int64)
    for number in range(size):
        some = keys[..., number::size].long()
        taken = (words.word[:, :, : some.shape[-1]] >> bit_of(number)) & 1
        found = found + (taken.sum(-1, dtype=torch.int64) * some).sum(-1)
    return found
