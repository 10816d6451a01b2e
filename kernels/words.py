"""Which key blocks tokens selected, as bits: sixteen times smaller than a number for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = 16
"""Most blocks of a group, whose bits are a word."""


def grouping(blocks: int) -> tuple[int, int]:
    """How many groups so many blocks make, and how many blocks a group has at most."""
    groups = -(-blocks // BITS)
    return groups, -(-blocks // max(1, groups))


def bit_of(number: int) -> int:
    """The bit of a group's block: blocks that are apart are bits that are neighbours."""
    return (number & 1) << 3 | (number & 2) << 1 | (number & 4) >> 1 | (number & 8) >> 3


def _worth(number: int) -> int:
    """A word with the bit of one block, as int16 holds it."""
    bit = bit_of(number)
    return 1 << bit if bit < BITS - 1 else -(1 << bit)


@dataclass(frozen=True, slots=True)
class Words:
    """Blocks taken by the group, and a word of bits for every group and token.

    Attributes:
        word: int16 ``[B|1, H|1, C, L]``, contiguous. Groups are runs of `grouping`'s size, the last
            one may be shorter; block ``i`` of a group is bit `bit_of` ``(i)``.
        blocks: ``N``.
    """

    word: Tensor
    blocks: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B|1, H|1, L, N)``, the shape of what is packed."""
        batch, heads, _, length = self.word.shape
        return batch, heads, length, self.blocks

    @classmethod
    def of(cls, select: Tensor) -> Words:
        """Pack bool ``[B|1, H|1, L, N]``."""
        batch, heads, length, blocks = select.shape
        groups, size = grouping(blocks)
        word = select.new_zeros((batch, heads, groups, length), dtype=torch.int16)
        for number in range(size):
            some = select[..., number::size].transpose(-1, -2)
            word[:, :, : some.shape[2]] |= some.to(torch.int16).mul_(_worth(number))
        return cls(word, blocks)

    @classmethod
    def full(cls, shape: tuple[int, int, int, int], device: torch.device) -> Words:
        """Every token with every block, ``(B, H, L, N)`` of them."""
        batch, heads, length, blocks = shape
        known = _known(blocks, device)
        word = known.expand(batch, heads, -1, length).contiguous()
        return cls(word, blocks)

    def select(self, b: int | None = None, h: int | None = None) -> Tensor:
        """Unpacked: bool ``[B|1, H|1, L, N]``, or ``[L, N]`` of one element and head."""
        word = self.word
        if b is not None and h is not None:
            word = word[b if word.shape[0] > 1 else 0, h if word.shape[1] > 1 else 0]
        _, size = grouping(self.blocks)
        made = word.new_empty((*word.shape[:-2], word.shape[-1], self.blocks), dtype=torch.bool)
        for number in range(size):
            some = made[..., number::size]
            some.copy_((word[..., : some.shape[-1], :] & _worth(number) != 0).transpose(-1, -2))
        return made

    def complement(self) -> Words:
        """What was not selected."""
        return Words(self.word ^ _known(self.blocks, self.word.device), self.blocks)


def _known(blocks: int, device: torch.device) -> Tensor:
    """int16 ``[C, 1]``: the bits of every group that stand for a block."""
    return Words.of(torch.ones(1, 1, 1, blocks, dtype=torch.bool, device=device)).word[0, 0]
