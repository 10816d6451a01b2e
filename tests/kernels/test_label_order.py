"""The order by labels, interpreted, against a stable sort."""

import pytest
import torch

from dit_accel.kernels.label_order import label_order
from dit_accel.kernels.packed import compact

pytest.importorskip("triton")
from dit_accel.kernels.label_order import triton as kernels


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts and sorts that end within the sequence."""
    monkeypatch.setattr(kernels, "_PART", 64)
    monkeypatch.setattr(kernels, "_SORTING", {"SORTED": 32, "SHIFT": 5, "num_warps": 4})


def labels_of(length, clusters, dtype=torch.int32, empty=()):
    generator = torch.Generator().manual_seed(length)
    made = torch.randint(0, clusters, (2, 2, length), generator=generator)
    for one in empty:
        made[made == one] = clusters - 1
    return made.to(dtype)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_labels_are_sorted_stably(backend):
    labels = torch.tensor([[[2, 0, 2, 2, 0]], [[1, 1, 0, 1, 1]]])
    perm, offsets = label_order(labels, 4, backend=backend)
    assert perm.tolist() == [[[1, 4, 0, 2, 3]], [[2, 0, 1, 3, 4]]]
    assert offsets.tolist() == [[[0, 2, 2, 5, 5]], [[0, 1, 5, 5, 5]]]


@pytest.mark.parametrize("text", [(0, 0), (0, 5), (40, 171), (97, 98)])
@pytest.mark.parametrize(("length", "clusters"), [(1, 1), (97, 3), (150, 40)])
def test_the_kernel_gives_what_the_sort_gives(length, clusters, text):
    if text[0] > length:
        text = (length, length + text[1] - text[0])
    labels = labels_of(length, clusters, empty=(0,) if clusters > 1 else ())
    options = {"text": text, "text_block": 16}
    perm, offsets = label_order(labels, clusters, backend="triton", **options)
    wanted, bounds = label_order(labels.long(), clusters, backend="reference", **options)
    assert torch.equal(perm, wanted)
    assert perm.dtype == wanted.dtype
    assert torch.equal(offsets, bounds)
    assert offsets.dtype == bounds.dtype
    number = torch.arange(length + text[1] - text[0]).expand_as(perm)
    assert torch.equal(perm.sort(-1).values, number)


def test_what_kernels_read_of_it_is_at_hand():
    perm, offsets = label_order(labels_of(80, 9), 9, text=(80, 150), backend="triton")
    order = compact(perm, offsets, None)
    assert order.perm.dtype == torch.int32
    assert torch.equal(order.perm.long(), perm)
    assert torch.equal(order.offsets, offsets)


def test_what_cannot_run_is_told():
    with pytest.raises(ValueError, match="integers"):
        label_order(torch.zeros(1, 1, 4), 2)
    with pytest.raises(ValueError, match="up to 4095 clusters, not 5000"):
        label_order(torch.zeros(1, 1, 9000, dtype=torch.int32), 5000, backend="triton")
