"""Which boxes each tile of tokens goes through: the kernels, interpreted, against plain Python."""

import math

import pytest
import torch

from dit_accel.kernels.packed import compact
from dit_accel.kernels.words import Words, bit_of, grouping

pytest.importorskip("triton")
lists = pytest.importorskip("dit_accel.kernels.token_attention.lists")
sorting = pytest.importorskip("dit_accel.kernels.token_attention.sorting")
merging = pytest.importorskip("dit_accel.kernels.token_attention.merging")
dealing = pytest.importorskip("dit_accel.kernels.token_attention.dealing")
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


@pytest.mark.parametrize(
    ("rows", "scratch"), [(2, None), (32, torch.ones(2**19, dtype=torch.uint8))]
)
def test_tiles_of_alike_tokens_and_their_boxes(monkeypatch, rows, scratch):
    monkeypatch.setattr(sorting, "_ROWS", rows)
    monkeypatch.setattr(sorting, "_TILES", 8)
    select, order = problem()
    groups, size = grouping(BLOCKS)
    assert (groups, size) == (2, 11)
    found = lists.boxes_of(order, LENGTH, size, BOX)
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
            assert made.item[first + tile, 6:].tolist() == [b, h]
            wanted = of_all + of_some + [0] * lists.AHEAD
            assert made.listed[item[5] :][: len(wanted)].tolist() == wanted
            seen += bool(of_all) + bool(of_some)
    assert seen > 4


@pytest.mark.parametrize("capacity", [1, 2, 3, 100])
def test_partials_are_merged_run_by_run(capacity):
    select, order = problem()
    groups, size = grouping(BLOCKS)
    found = lists.boxes_of(order, LENGTH, size, BOX)
    made = lists.lists(Words.of(select), found, HEADS, 1, 2, BOX)
    generator = torch.Generator().manual_seed(1)
    every = int(made.first[-1])
    part = torch.randn(every * lists.ROWS, 16, generator=generator)
    part_lse = 3 * torch.randn(every * lists.ROWS, generator=generator)
    out, lse = torch.full((2, HEADS, LENGTH, 16), 7.0), torch.full((2, HEADS, LENGTH), 7.0)
    state = merging.State.of(1, LENGTH, 16, torch.device("cpu"))
    most = groups * -(-LENGTH // lists.ROWS)
    rows = capacity * lists.ROWS
    for pair in range(2):
        first = made.first[pair * groups :]
        for run in range(-(-most // capacity)):
            # as the attention leaves them, behind what an earlier run left
            begin = (int(first[0]) + run * capacity) * lists.ROWS
            end = min(begin + rows, int(first[groups]) * lists.ROWS)
            held, held_lse = torch.full((rows, 16), torch.nan), torch.full((rows,), torch.nan)
            held[: max(0, end - begin)] = part[begin:end]
            held_lse[: max(0, end - begin)] = part_lse[begin:end]
            merging.merge_items(
                held, held_lse, made.place, made.first, state, out, lse, groups, 1, pair, 1, run
            )
        b, h = divmod(1 + pair, HEADS)
        for token in range(LENGTH):
            units = range(pair * groups, (pair + 1) * groups)
            where = [
                int(made.first[unit]) * lists.ROWS + int(made.place[unit, token])
                for unit in units
                if made.place[unit, token] >= 0
            ]
            logs = part_lse[where] * math.log(2)
            torch.testing.assert_close(lse[b, h, token], logs.logsumexp(0))
            weighed = (logs.softmax(0)[:, None] * part[where]).sum(0)
            torch.testing.assert_close(out[b, h, token], weighed, atol=1e-5, rtol=1e-5)
    assert (out[0, 0] == 7).all()
    assert (out[1, 1] == 7).all()


@pytest.mark.parametrize(("many", "wide"), [(8, False), (8, True), (4, False)])
@pytest.mark.parametrize(("held", "capacity"), [(1, 100), (1, 3), (2, 200), (4, 200)])
def test_items_are_dealt_out_once_and_evenly(held, capacity, many, wide, monkeypatch):
    monkeypatch.setattr(dealing, "_MANY", many)
    if wide:
        monkeypatch.setattr(dealing, "_COST_BITS", 31)  # more runs than 32 bits tell apart
    pairs, groups, rows, programs, box = 3, 2, 8, 5, 16
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(0, rows + 1, (pairs * groups,), generator=generator)
    counts[2:4] = 0
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    every = int(first[-1])
    item = torch.full((pairs * groups * rows, 8), 10**6, dtype=torch.int32)
    item[:every, 0] = torch.arange(pairs * groups).repeat_interleave(counts)
    item[:every, 4] = torch.randint(1, 90, (every,), generator=generator)
    runs_of = -(-held * groups * rows // capacity)
    made = dealing.deal(item, first, groups, pairs, held, runs_of, capacity, programs, box)
    cost = item[:, 4] + dealing._BEGIN // box
    for together in range(-(-pairs // held)):
        begin = int(first[together * held * groups])
        end = int(first[min(pairs, (together + 1) * held) * groups])
        for run in range(runs_of):
            of_run = range(begin + run * capacity, min(end, begin + (run + 1) * capacity))
            seen, busy = [], []
            for number in made.start[together, run].tolist():
                busy.append(0)
                while number >= 0:
                    seen.append(number)
                    busy[-1] += int(cost[number])
                    number = int(made.next[number])
            assert sorted(seen) == list(of_run)
            if seen:
                # what a list of the longest first is sure of (Graham 1969)
                least = max(sum(busy) / programs, int(cost[seen].max()))
                assert max(busy) <= 4 / 3 * least + 1
                assert max(busy) - min(busy) <= int(cost[seen].max())


@pytest.mark.parametrize("most", [1, 30, 190, 600])
@pytest.mark.parametrize("every", [1, 12, 40])
@pytest.mark.parametrize("budget", [1, 200, 1000, 5000, 10**6])
def test_what_is_kept_fits_the_budget(budget, every, most):
    sizes = {"listed": 4 * most, "ordered": 30, "parted": 10, "state": 40}
    fits = runs.room_for(every, most, budget, **sizes)
    assert 1 <= fits.heads <= fits.pairs <= every
    assert fits.items * fits.runs >= fits.heads * most
    taken = fits.pairs * sizes["listed"] + fits.items * sizes["parted"]
    taken += fits.heads * sizes["ordered"]
    if fits.runs > 1:
        assert fits.heads == 1
        taken += sizes["state"]
    assert taken <= max(budget, sum(sizes.values()))
    assert fits.runs == 1 or budget < 10**6
