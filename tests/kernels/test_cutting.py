"""Blocks cut into tiles by the kernel, interpreted, against the plain operations."""

import pytest
import torch

from dit_accel.kernels.packed import tiles

pytest.importorskip("triton")
from dit_accel.kernels import cutting


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("sizes", [[1], [0], [5, 0, 128, 129, 0, 300, 16], [40] * 37 + [0, 0]])
def test_the_same_tiles(sizes, size, monkeypatch):
    monkeypatch.setattr(cutting, "_CHUNK", 16)
    every = torch.tensor([sizes, sizes[::-1]]).view(2, 1, -1)
    offsets = torch.nn.functional.pad(every.cumsum(-1), (1, 0)).to(torch.int32)
    length = sum(sizes)
    made, first = cutting.cut_blocks(offsets, length, size)
    wanted = tiles(offsets, length, size)
    number = wanted.span.shape[-1]
    assert torch.equal(made.span[..., :number], wanted.span)
    assert (made.span[..., number:] == 0).all()
    real = wanted.span != 0
    assert torch.equal(made.block[..., :number][real], wanted.block[real])
    pieces = -(-every // size)
    assert torch.equal(first, torch.nn.functional.pad(pieces.cumsum(-1), (1, 0)).to(torch.int32))


def test_nothing_to_cut():
    made, first = cutting.cut_blocks(torch.zeros(1, 1, 1, dtype=torch.int32), 0, 64)
    assert made.span.tolist() == [[[0]]]
    assert first.tolist() == [[[0]]]
