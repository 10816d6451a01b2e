"""Sampled keys as the kernels of block importance read them, and what is kept between the two."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.order import lead_strides

CELL = 16
"""Sampled keys of a cell."""
TURN = 128
"""Slots for sampled keys that a kernel takes at once, of 8 cells."""
PER = TURN // CELL


class Cells(NamedTuple):
    """Blocks of samples padded to whole cells, and those to whole turns.

    ``tokens`` int32 ``[B|1, H|1, S]``, a token for each slot or -1; ``first`` int32
    ``[B|1, H|1, N + 1]``, the cells of each block; ``plain`` int8 ``[B|1, H|1, S / 128]``, turns
    without a -1.
    """

    tokens: Tensor
    first: Tensor
    plain: Tensor


def one_each(longest: int | None) -> bool:
    """Whether no block has more samples than a cell holds: each then has one, even if empty."""
    return longest is not None and longest <= CELL


def cells_of(tokens: Tensor, bounds: Tensor, longest: int | None) -> Cells:
    """Lay samples out in cells.

    Args:
        tokens: int64 ``[B|1, H|1, M]``.
        bounds: int32 ``[B|1, H|1, N + 1]``.
        longest: samples of the longest block, where the caller knows.
    """
    bounds = bounds.long()
    lead = tuple(max(a, b) for a, b in zip(bounds.shape[:2], tokens.shape[:2], strict=True))
    bounds, tokens = bounds.expand(*lead, -1), tokens.expand(*lead, -1)
    count = bounds.diff(dim=-1)
    per_block = torch.ones_like(count) if one_each(longest) else -(-count // CELL)
    ends = per_block.cumsum(-1)
    cells = torch.nn.functional.pad(ends, (1, 0))
    most = tokens.shape[-1] // CELL + count.shape[-1]
    if longest is not None:
        most = min(most, count.shape[-1] * max(1, -(-longest // CELL)))
    slots = -(-most * CELL // TURN) * TURN
    slot = torch.arange(slots, device=tokens.device)
    turn, column = slot // TURN, slot % TURN
    of = turn * PER + column % 8 // 2 * 2 + column // 64
    within = column % 64 // 8 * 2 + column % 2
    of, within = of.expand(*lead, -1).contiguous(), within.expand(*lead, -1)
    block = torch.searchsorted(ends.contiguous(), of, right=True)
    block.clamp_(max=count.shape[-1] - 1)
    inside = (of - cells.gather(-1, block)) * CELL + within
    keep = (inside < count.gather(-1, block)) & (of < ends[..., -1:])
    where = (bounds.gather(-1, block) + inside).clamp_(max=tokens.shape[-1] - 1)
    token = tokens.gather(-1, where).masked_fill_(~keep, -1).to(torch.int32)
    plain = (token.view(*lead, -1, TURN) >= 0).all(-1)
    return Cells(token, cells.to(torch.int32), plain.to(torch.int8))


class Kept(NamedTuple):
    """What is kept of some heads.

    ``keys`` ``[P, S, D]`` in slots; ``sums`` ``[P, M, S / 16]`` of weights by query and cell, in
    powers of two relative to ``bases`` ``[P, S / 128, M]`` by turn and query; ``lse`` ``[P, M]``.
    Sums lie in 0 to 16, and are fp16 where the inputs are of 16 bits; bases and lse are fp32.
    """

    keys: Tensor
    sums: Tensor
    bases: Tensor
    lse: Tensor


def room_for(pairs: int, samples: int, slots: int, like: Tensor) -> Kept:
    """Room for some heads' sums, of queries ``like`` these."""
    device, depth = like.device, like.shape[-1]
    kind = torch.float16 if like.dtype.itemsize == 2 else torch.float32
    return Kept(
        torch.empty(pairs, slots, depth, dtype=like.dtype, device=device),
        torch.empty(pairs, samples, slots // CELL, dtype=kind, device=device),
        torch.empty(pairs, slots // TURN, samples, dtype=torch.float32, device=device),
        torch.empty(pairs, samples, dtype=torch.float32, device=device),
    )


class Probe(NamedTuple):
    """Some heads of a call: ``pairs`` of a batch element and a head, from the number ``first``."""

    q: Tensor
    tokens: Tensor
    bounds: Tensor
    cells: Cells
    kept: Kept
    scale: float
    first: int
    pairs: int

    def pointers(self, keys: object) -> tuple[object, ...]:
        """What a kernel of sums reads and writes, with ``keys`` as it takes them."""
        cells, kept = self.cells, self.kept
        return (
            *(self.q, keys, self.tokens, self.bounds),
            *(cells.first, cells.tokens, cells.plain),
            *(kept.sums, kept.bases, kept.lse),
        )

    def sizes(self) -> tuple[int | float, ...]:
        """The numbers that follow them."""
        return (
            *self.q.stride()[:3],
            *(*lead_strides(self.tokens), *lead_strides(self.bounds)),
            *(*lead_strides(self.cells.first), *lead_strides(self.cells.plain)),
            self.scale,
            *(self.cells.plain.shape[-1], self.tokens.shape[-1]),
            *(self.bounds.shape[-1] - 1, self.cells.first.shape[-1] - 1),
            *(self.q.shape[1], self.first),
        )


NUMBERS = [f"{name}_{axis}" for name in ("token", "bound", "cell", "turn") for axis in "bh"]
NUMBERS += ["turns", "samples", "rows", "columns", "heads", "first_pair"]
"""Names of sizes that no kernel is compiled for."""


def signature_of(kernel: object, dtype: str, keys: str) -> dict[str, str]:
    """Types of what `Probe` gives a kernel, whose keys are of type ``keys``."""
    types = {
        **{"q": f"*{dtype}", "keys": keys, "q_token": "*i64", "plain": "*i8", "scale": "fp32"},
        **dict.fromkeys(("q_bound", "cell", "key_token"), "*i32"),
        **{"sums": "*fp32" if dtype == "fp32" else "*fp16", "bases": "*fp32", "lse": "*fp32"},
    }
    names = kernel.arg_names  # type: ignore[attr-defined]
    return {name: types.get(name, "i32") for name in names if not name.isupper()}
