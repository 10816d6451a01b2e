"""Lists of tiles by level, packed by the kernel, interpreted, against the plan they are of."""

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels.block_attention import levels, means, problem
from dit_accel.kernels.packed import LENGTH_BITS, START_BIT, compact
from dit_accel.kernels.pair_count import pair_count

LENGTH = 333


def orders(longest, generator):
    perm = torch.randperm(LENGTH, generator=generator).view(1, 1, -1)
    if longest is None:
        cuts = torch.randint(0, LENGTH + 1, (1, 1, 8), generator=generator)
        ends = torch.tensor([0, 0, LENGTH]).view(1, 1, -1)
        return perm, torch.cat([cuts, ends], -1).sort(-1).values.to(torch.int32)
    bounds = torch.arange(0, LENGTH + longest, longest).clamp(max=LENGTH)
    # one block is empty, as padding leaves them
    return perm, torch.cat([bounds[:3], bounds[2:]]).to(torch.int32).view(1, 1, -1)


@pytest.mark.parametrize(
    ("longest", "size", "kinds"),
    [
        (64, 64, (0, 1, 2, 4, 8)),
        (32, 64, (0, 1, 2, 4, 8)),
        (128, 64, (0, 1, 2, 4, 8)),
        (None, 16, (0, 1, 2, 4, 8)),
        (5, 64, (0, 1, 2, 4, 8)),
        (64, 64, (4, 1)),
        (64, 64, (8,)),
    ],
)
def test_lists_hold_what_the_plan_says(longest, size, kinds):
    generator = torch.Generator().manual_seed(len(kinds))
    perm, offsets = orders(longest, generator)
    order = compact(perm, offsets, None)
    blocks = offsets.shape[-1] - 1
    drawn = torch.randint(0, len(kinds), (2, 1, 2, blocks), generator=generator)
    code = torch.tensor(kinds, dtype=torch.int8)[drawn]
    found = means.rows_of(order.offsets, LENGTH, size, longest)
    pairs = torch.zeros(2, 1, dtype=torch.int64)
    bounds = torch.tensor([[[0, 5, 12]]], dtype=torch.int32)
    listed, counts = levels.packed_levels(code, found, bounds, pairs, 1, size)
    assert torch.equal(pairs, pair_count(code, found.sizes, bounds.diff()))
    assert listed.shape == (2, 1, 2, found.most)
    keys_of = meaning(found)
    for row, number, kind in zip(
        listed.view(-1, found.most), counts.view(-1, 8), code.view(-1, blocks), strict=True
    ):
        at, seen = 0, []
        for i, level in enumerate((1, 2, 4, 8)):
            box = means.box_of(level, size)
            full, every = number[2 * i : 2 * i + 2].tolist()
            padded = -(-every // (means.TURN // box)) * (means.TURN // box)
            entries = row[at : at + padded].tolist()
            assert not any(entries[every:])
            for j, entry in enumerate(entries[:every]):
                start, rows = entry >> START_BIT, entry & ((1 << LENGTH_BITS) - 1)
                per = ((entry >> LENGTH_BITS) & 7) + 1
                whole = rows == box and per == level
                assert whole == (j < full)
                for place in range(start, start + rows):
                    first, count = keys_of[place]
                    assert count == per
                    seen += [(key, level) for key in range(first, first + count)]
            at += padded
        assert not row[at : at + problem.AHEAD].any()
        wanted = [
            (key, int(kind[block]))
            for block in range(blocks)
            for key in range(int(offsets[0, 0, block]), int(offsets[0, 0, block + 1]))
            if kind[block] != 0
        ]
        assert sorted(seen) == sorted(wanted)


def meaning(found):
    """What every row of a table stands for: its first key in the order, and how many keys."""
    rows = {place: (place, 1) for place in range(LENGTH)}
    starts = found.first[0, 0, 0].tolist()
    for level, first in zip((2, 4, 8), found.first[0, 0, 1:].tolist(), strict=True):
        for begin, stop, at in zip(starts, starts[1:], first, strict=False):
            for i, key in enumerate(range(begin, stop, level)):
                assert at + i not in rows, "no row is two blocks'"
                rows[at + i] = key, min(level, stop - key)
    assert max(rows) < found.height
    return rows


@pytest.mark.parametrize(
    ("longest", "padded", "dtype"),
    [
        (64, False, torch.float16),
        (64, True, torch.float32),
        (32, True, torch.float16),
        (128, False, torch.float32),
        (None, True, torch.float16),
    ],
)
def test_tables_hold_keys_and_means(dtype, longest, padded):
    generator = torch.Generator().manual_seed(4)
    perm, offsets = orders(longest, generator)
    valid = torch.rand(2, LENGTH, generator=generator) < 0.8 if padded else None
    k, v = torch.randn(2, 2, 1, LENGTH, 16, generator=generator).to(dtype)
    if padded:
        k = k.masked_fill(~valid[:, None, :, None], torch.nan)
    order = compact(perm, offsets, valid)
    found = means.rows_of(order.offsets, LENGTH, 64, longest)
    pairs = torch.ones(2, 1, dtype=torch.int64)
    *tables, rows, zero = means.tables_with_means(k.mT.contiguous().mT, v, order, found, pairs)
    assert (pairs == 0).all()
    assert rows.data_ptr() == tables[0].data_ptr()
    assert rows.shape == (2 * 2 * found.height, 16)
    assert zero == 0
    for x, table in zip((k, v), tables, strict=True):
        assert table.shape == (2, 1, found.height, 16)
        for b in range(2):
            own = order.perm[b if padded else 0, 0].long()
            here = found._replace(first=found.first[b if padded else 0][None])
            rows = meaning(here)
            starts = here.first[0, 0, 0].tolist()
            sums = torch.zeros(1, found.height, 16, dtype=torch.float64)
            counts = torch.ones(found.height, dtype=torch.float64)
            for place, (key, number) in rows.items():
                if key < starts[-1]:
                    tokens = own[key : key + number]
                    sums[:, place] = x[b][:, tokens].double().sum(1)
                    counts[place] = number
            wanted = sums / counts[:, None]
            # rounded once, from sums in fp32
            bound = wanted.abs() * torch.finfo(dtype).eps + 1e-6
            assert ((table[b] - wanted).abs() <= bound).all()


def test_heads_are_taken_as_memory_allows(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    _, offsets = orders(64, generator)
    found = means.rows_of(offsets, LENGTH, 64, 64)
    k = torch.empty(2, 5, LENGTH, 16)
    marks = torch.arange(10).view(2, 5)
    one = 2 * found.height * 16 * 4
    monkeypatch.setattr(levels, "TABLE_BYTES", 2 * one)
    groups = [some(marks).flatten().tolist() for some in levels.head_groups(k, found)]
    assert [mark for group in groups for mark in group] == list(range(10))
    assert max(map(len, groups)) == 2
    (whole,) = levels.head_groups(k, found, whole=True)
    assert torch.equal(whole(marks), marks)
