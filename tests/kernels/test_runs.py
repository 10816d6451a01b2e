"""Lists of boxes of a plan over ragged blocks, interpreted, against sets of keys."""

import pytest
import torch

from dit_accel.kernels.packed import LENGTH_BITS, START_BIT
from dit_accel.kernels.pair_count import pair_count

pytest.importorskip("triton")
from dit_accel.kernels.block_attention import runs

AHEAD = 16


def plan(columns=40, rows=5):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 50, (2, 2, columns), generator=generator)
    sizes[:, :, ::7] = 0
    offsets = torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).to(torch.int32)
    code = torch.randint(-1, 3, (2, 2, rows, columns), generator=generator).to(torch.int8)
    code[..., 1:3] = 1
    code[0, 0, 0], code[0, 0, 1] = -1, 1
    return code, offsets


def bounds_of_rows(code):
    """Rows of 0, 3, 6, ... queries."""
    sizes = torch.arange(-1, code.shape[2]) * 3
    return sizes.clamp(min=0).cumsum(0).to(torch.int32).expand(*code.shape[:2], -1).contiguous()


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("size", [8, 16, 64])
def test_boxes_hold_the_keys_of_exact_blocks_once(size, chunk, monkeypatch):
    monkeypatch.setattr(runs, "_CHUNK", chunk)
    code, offsets = plan()
    length = int(offsets.max())
    pairs = torch.zeros(2, 2, dtype=torch.int64)
    bounds = bounds_of_rows(code)
    given = code, offsets, bounds, pairs, 2, length, size, AHEAD
    listed, counts = runs.packed_runs(*given)
    assert torch.equal(pairs, pair_count(code, offsets.diff(), bounds.diff()))
    for b, h, row in torch.cartesian_prod(*map(torch.arange, code.shape[:3])).tolist():
        bounds = offsets[b, h].tolist()
        exact = code[b, h, row] == 1
        wanted = [x for j in exact.nonzero().flatten() for x in range(bounds[j], bounds[j + 1])]
        full, every = counts[b, h, row].tolist()
        entries = listed[b, h, row].tolist()
        starts = [entry >> START_BIT for entry in entries[:every]]
        sizes = [entry & ((1 << START_BIT) - 1) for entry in entries[:every]]
        assert all(0 < x < 1 << LENGTH_BITS for x in sizes), "and none is a mean"
        assert [x == size for x in sizes] == [i < full for i in range(every)]
        got = [x for start, n in zip(starts, sizes, strict=True) for x in range(start, start + n)]
        assert sorted(got) == wanted
        assert entries[every : every + AHEAD] == [0] * AHEAD
        # neighbours make one run, of which only the last box can be short
        some = exact & (offsets[b, h].diff() > 0)
        ends = some & ~torch.cat([some[1:], some.new_zeros(1)])
        assert every - full <= int(ends.sum())


def test_a_plan_for_all_heads_and_one_order():
    code, offsets = plan()
    order = code[:1, :1], offsets[:1, :1], bounds_of_rows(code)[:1, :1]
    every, one = (torch.zeros(2, n, dtype=torch.int64) for n in (3, 1))
    listed, counts = runs.packed_runs(*order, every, 3, 900, 16, AHEAD)
    alone, number = runs.packed_runs(*order, one[:1], 1, 900, 16, AHEAD)
    assert (every == one[0]).all()
    assert (counts == number).all()
    for row in range(code.shape[2]):
        some = int(number[0, 0, row, 1])
        assert (listed[:, :, row, :some] == alone[:, :, row, :some]).all()
