"""Which boxes each tile of tokens goes through: the kernels, interpreted, against plain Python."""

import pytest
import torch

from dit_accel.kernels.packed import compact
from dit_accel.kernels.words import Words, bit_of, grouping

pytest.importorskip("triton")
lists = pytest.importorskip("dit_accel.kernels.token_attention.lists")
sorting = pytest.importorskip("dit_accel.kernels.token_attention.sorting")
runs = pytest.importorskip("dit_accel.kernels.token_attention.runs")
LENGTH, BLOCKS, HEADS, BOX = 150, 21, 2, 16


def gray_place(word):
    place = 0
    while word:
        place ^= word
        word >>= 1
    return place


def problem():
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(2, HEADS, 1, BLOCKS, generator=generator)
    select = torch.rand(2, HEADS, LENGTH, BLOCKS, generator=generator) < share * 0.6
    select[0, 1, :60] = False
    select[1, 0] = select[1, 0, :1]
    cuts = torch.randint(0, LENGTH, (BLOCKS - 1,), generator=generator).sort().values.tolist()
    offsets = torch.tensor([0, *cuts, LENGTH], dtype=torch.int32).view(1, 1, -1)
    perm = torch.randperm(LENGTH, generator=generator).view(1, 1, -1)
    valid = torch.rand(2, LENGTH, generator=generator) < 0.9
    return select, compact(perm, offsets, valid)


@pytest.mark.parametrize(("programs", "scratch"), [(1, None), (12, torch.ones(2**19))])
def test_tiles_of_alike_tokens_and_their_boxes(monkeypatch, programs, scratch):
    monkeypatch.setattr(sorting, "_SORTED", 16)
    select, order = problem()
    groups, size = grouping(BLOCKS)
    assert (groups, size) == (2, 11)
    found = lists.boxes_of(order, LENGTH, size, BOX)
    monkeypatch.setattr(sorting, "_PROGRAMS", programs)
    words = sorting.pack(select)
    assert torch.equal(words.word, Words.of(select).word)
    made = lists.lists(words, found, HEADS, 1, 2, BOX, scratch)
    seen = 0
    for unit in range(2 * groups):
        pair, group = divmod(unit, groups)
        b, h = divmod(1 + pair, HEADS)
        bounds = order.offsets[b % order.offsets.shape[0], 0].tolist()
        chosen = select[b, h, :, group * size : (group + 1) * size].tolist()
        words = [sum(1 << bit_of(i) for i, x in enumerate(row) if x) for row in chosen]
        tokens = [i for i in range(LENGTH) if words[i]]
        tokens.sort(key=lambda i: gray_place(words[i]))
        count = len(tokens)
        assert made.token[unit, :count].tolist() == tokens
        assert (made.word[unit, :count].int() & 0xFFFF).tolist() == [words[i] for i in tokens]
        places = [tokens.index(i) if words[i] else -1 for i in range(LENGTH)]
        assert made.place[unit].tolist() == places
        first = int(made.first[unit])
        assert int(made.first[unit + 1]) - first == -(-count // lists.ROWS)
        for tile, begin in enumerate(range(0, count, lists.ROWS)):
            rows = [words[i] for i in tokens[begin : begin + lists.ROWS]]
            of_all, of_some = [], []
            for i in range(min(size, BLOCKS - group * size)):
                start, stop = bounds[group * size + i : group * size + i + 2]
                for at in range(start, stop, BOX):
                    length = min(BOX, stop - at)
                    entry = at << 11 | bit_of(i) << 7 | length
                    everyone = all(word >> bit_of(i) & 1 for word in rows)
                    if everyone and length == BOX:
                        of_all.append(entry)
                    elif any(word >> bit_of(i) & 1 for word in rows):
                        of_some.append(entry)
            item = made.item[first + tile, :6].tolist()
            every = len(of_all) + len(of_some)
            assert item[:5] == [unit, tile, len(rows), len(of_all), every]
            wanted = of_all + of_some + [0] * lists.AHEAD
            assert made.listed[item[5] :][: len(wanted)].tolist() == wanted
            seen += bool(of_all) + bool(of_some)
    assert seen > 4


@pytest.mark.parametrize("units", [1, 3, 7, 14, 21, 100])
@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_runs_hold_every_group_once(pairs, units):
    groups = 7
    units = units if units < groups else units // groups * groups
    found = list(runs.runs(pairs, groups, units))
    held = [unit for first, count in found for unit in range(first, first + count)]
    assert held == list(range(pairs * groups))
    for first, count in found:
        assert count <= units
        # whole heads, or a part of one
        whole = first % groups == 0 and count % groups == 0
        assert whole or first // groups == (first + count - 1) // groups


@pytest.mark.parametrize("groups", [1, 3, 19, 60, 91])
@pytest.mark.parametrize("every", [1, 12, 40])
@pytest.mark.parametrize("budget", [1, 200, 1000, 5000, 10**5])
def test_what_is_kept_fits_the_budget(budget, every, groups):
    sizes = {"listed": 4 * groups, "ordered": 30, "parted": 10, "state": 40}
    fits = runs.room_for(every, groups, budget, **sizes)
    assert 1 <= fits.pairs <= every
    assert 1 <= fits.units <= groups * every
    whole = fits.units >= groups
    if whole:
        assert fits.units % groups == 0
        assert fits.pairs % (fits.units // groups) == 0 or fits.pairs == every
    held = fits.units // groups if whole else 1
    taken = fits.pairs * sizes["listed"] + fits.units * sizes["parted"] + held * sizes["ordered"]
    taken += 0 if whole else sizes["state"]
    least = sizes["listed"] + sizes["parted"] + sizes["ordered"] + sizes["state"]
    assert taken <= max(budget, least)
    if budget == 10**5:
        assert whole
