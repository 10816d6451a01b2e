"""Lists of tiles by level, packed by the kernel, interpreted, against the plan they are of."""

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels.block_attention import levels
from dit_accel.kernels.packed import LENGTH_BITS, START_BIT, compact, pooled, tiles

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
    exact = tiles(order.offsets, LENGTH, size, longest)
    pyramid = pooled(
        order.offsets, LENGTH, (2, 4, 8), lambda level: levels.box_of(level, size), longest
    )
    found = levels.mixed(exact, pyramid, blocks, size)
    listed, counts = levels.packed_levels(code, found, 2, 1, size)
    assert listed.shape == (2, 1, 2, found.most)
    keys_of = rows_of(pyramid)
    for row, number, kind in zip(
        listed.view(-1, found.most), counts.view(-1, 8), code.view(-1, blocks), strict=True
    ):
        at, seen = 0, []
        for i, level in enumerate((1, 2, 4, 8)):
            box = levels.box_of(level, size)
            full, every = number[2 * i : 2 * i + 2].tolist()
            padded = -(-every // (levels.TURN // box)) * (levels.TURN // box)
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
        assert not row[at : at + levels.AHEAD].any()
        wanted = [
            (key, int(kind[block]))
            for block in range(blocks)
            for key in range(int(offsets[0, 0, block]), int(offsets[0, 0, block + 1]))
            if kind[block] != 0
        ]
        assert sorted(seen) == sorted(wanted)


def rows_of(pyramid):
    """Where in the order the keys of every row of a table begin, and how many they are."""
    rows = [(place, 1) for place in range(LENGTH)]
    for span in pyramid.span[0, 0].tolist():
        rows.append((span >> START_BIT, span & ((1 << LENGTH_BITS) - 1)))
    return rows


def test_heads_are_taken_as_memory_allows(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    _, offsets = orders(64, generator)
    pyramid = pooled(offsets, LENGTH, (2, 4, 8), lambda level: levels.box_of(level, 64), 64)
    k = torch.empty(2, 5, LENGTH, 16)
    marks = torch.arange(10).view(2, 5)
    one = 2 * pyramid.height * 16 * 4
    monkeypatch.setattr(levels, "TABLE_BYTES", 2 * one)
    groups = [some(marks).flatten().tolist() for some in levels.head_groups(k, pyramid)]
    assert [mark for group in groups for mark in group] == list(range(10))
    assert max(map(len, groups)) == 2
    (whole,) = levels.head_groups(k, pyramid, whole=True)
    assert torch.equal(whole(marks), marks)
