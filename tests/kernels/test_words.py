"""Selections as bits."""

import pytest
import torch

from dit_accel.kernels.words import BITS, Words, bit_of, grouping


def test_groups_are_even():
    assert [grouping(n) for n in (1, 11, 16, 17, 300, 960)] == [
        *((1, 1), (1, 11), (1, 16), (2, 9)),
        *((19, 16), (60, 16)),
    ]


def test_every_block_of_a_group_has_a_bit():
    assert sorted(map(bit_of, range(BITS))) == list(range(BITS))


@pytest.mark.parametrize("blocks", [1, 9, 16, 17, 40])
def test_packed_and_unpacked(blocks):
    generator = torch.Generator().manual_seed(blocks)
    select = torch.rand(2, 3, 50, blocks, generator=generator) < 0.4
    words = Words.of(select)
    groups, size = grouping(blocks)
    assert words.word.shape == (2, 3, groups, 50)
    assert words.shape == select.shape
    assert torch.equal(words.select(), select)
    assert torch.equal(words.select(1, 2), select[1, 2])
    assert torch.equal(words.complement().select(), ~select)
    block = blocks - 1
    word = words.word[1, 2, block // size, 7].item()
    assert word >> bit_of(block % size) & 1 == select[1, 2, 7, block].item()


def test_one_selection_for_all_heads_and_everything():
    select = torch.rand(1, 1, 20, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(Words.of(select).select(3, 1), select[0, 0])
    assert Words.full((2, 1, 20, 21), torch.device("cpu")).select().all()
