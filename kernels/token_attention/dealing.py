"""Which program computes which items, known before they start.

Items differ much in length, and a program has few of them where a sequence is short: dealt out in
turn, the program with the longest ones would work half as long again as the average. So those of a
run are sorted by length, the longest first, and each goes to the program with the least to do
(Graham 1969, LPT). All that the next items can do at once is one step, so that there are about as
many steps as a program has items.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.specimen import Specimen, alike

ITEM_NUMBERS = tl.constexpr(8)
"""Numbers of an item, `lists.ITEM`; its unit and its boxes are those at 0 and 4."""
_COST_BITS = 15
_BEGIN = 200
"""Keys that take as long as an item's beginning and end."""
_MANY = 8
"""Items of a program, at least 4, that are dealt out one by one."""
_KEYED = 1024
_COST = tl.constexpr(_COST_BITS)
_MOST_COST = tl.constexpr((1 << _COST_BITS) - 1)
MOST_PROGRAMS = 256
"""Programs that items are dealt to at most."""
_PROGRAM_AT, _BUSY_AT = tl.constexpr(27), tl.constexpr(35)
_NONE = tl.constexpr((1 << 27) - 1)
_PROGRAM = tl.constexpr(MOST_PROGRAMS - 1)
_IDLE = tl.constexpr(1 << 27)


@triton.jit(do_not_specialize=["items", "units", "groups", "held", "runs", "capacity", "least"])
def _keys(
    item_ptr, first_ptr, key_ptr, items, units, groups, held, runs, capacity, least,
    WIDE: tl.constexpr, LAST: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """What items are sorted by: the run that they are of, and in it the longest first."""
    number = tl.program_id(0) * BT + tl.arange(0, BT)
    there = number < tl.load(first_ptr + units)
    item = item_ptr + number.to(tl.int64) * ITEM_NUMBERS
    unit = tl.load(item, mask=there, other=0)
    cost = tl.load(item + 4, mask=there, other=0) + least
    together = unit // (groups * held)
    begin = tl.load(first_ptr + together * (groups * held), mask=there, other=0)
    key = together * runs + (number - begin) // capacity
    if WIDE:
        key = key.to(tl.int64)
    key = (key << _COST) | (_MOST_COST - tl.minimum(cost, _MOST_COST))
    key = tl.where(there, key, tl.full([BT], LAST, key.dtype))
    tl.store(key_ptr + number, key, mask=number < items)


@triton.jit(do_not_specialize=["groups", "held", "pairs", "capacity", "programs"])
def _deal(
    key_ptr, order_ptr, first_ptr, next_ptr, start_ptr, groups, held, pairs, capacity, programs,
    MANY: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A run's items, dealt out: the first of every program, and which one follows an item."""
    run, together = tl.program_id(0), tl.program_id(1)
    begin = tl.load(first_ptr + together * held * groups) + run * capacity
    end = tl.load(first_ptr + tl.minimum((together + 1) * held, pairs) * groups)
    end = tl.minimum(end, begin + capacity)
    start_ptr += (together * tl.num_programs(0) + run) * programs
    lane = tl.arange(0, BP)
    # what a program has to do, which one it is, and its last item; the least busy one first
    busy = tl.where(lane < programs, 0, _IDLE).to(tl.int64)
    state = (busy << _BUSY_AT) | (lane.to(tl.int64) << _PROGRAM_AT) | _NONE
    # where there are many, four for each to begin with, to and fro: that is nearly as even
    while end - begin > MANY * programs:
        more = state
        for i in tl.static_range(4):
            here = begin + i * programs + (lane if i % 2 == 0 else programs - 1 - lane)
            takes = lane < programs
            cost = _MOST_COST - (tl.load(key_ptr + here, mask=takes, other=0) & _MOST_COST)
            item = tl.load(order_ptr + here, mask=takes, other=0)
            program, last = (more >> _PROGRAM_AT) & _PROGRAM, more & _NONE
            tl.store(next_ptr + last, item.to(tl.int32), mask=takes & (last != _NONE))
            tl.store(start_ptr + program, item.to(tl.int32), mask=takes & (last == _NONE))
            busy = (more >> _BUSY_AT) + cost
            more = tl.where(takes, (busy << _BUSY_AT) | (program << _PROGRAM_AT) | item, more)
        state = tl.sort(more)
        begin += 4 * programs
    while begin < end:
        here = begin + lane
        there = here < end
        cost = _MOST_COST - (tl.load(key_ptr + here, mask=there, other=0) & _MOST_COST)
        item = tl.load(order_ptr + here, mask=there, other=0)
        busy = state >> _BUSY_AT
        program = (state >> _PROGRAM_AT) & _PROGRAM
        last = state & _NONE
        # no program would be less busy with one of these items than the one that takes it is now
        takes = there & (busy <= tl.min(busy, 0) + cost) & (program < programs)
        tl.store(next_ptr + last, item.to(tl.int32), mask=takes & (last != _NONE))
        tl.store(start_ptr + program, item.to(tl.int32), mask=takes & (last == _NONE))
        more = ((busy + cost) << _BUSY_AT) | (program << _PROGRAM_AT) | item
        state = tl.sort(tl.where(takes, more, state))
        begin += tl.sum(takes.to(tl.int32), 0)
    program = (state >> _PROGRAM_AT) & _PROGRAM
    last = state & _NONE
    nothing = tl.full([BP], -1, tl.int32)
    tl.store(next_ptr + last, nothing, mask=last != _NONE)
    tl.store(start_ptr + program, nothing, mask=(last == _NONE) & (program < programs))


class Dealt(NamedTuple):
    """``start`` int32 ``[S, R, P]``, the first item of every program in every run of some heads, or
    -1; ``next`` int32, the item that a program computes after each, or -1."""

    start: Tensor
    next: Tensor


def bytes_of(items: int) -> int:
    """What it takes to deal out so many items."""
    return items * 24


def deal(
    item: Tensor,
    first: Tensor,
    groups: int,
    pairs: int,
    held: int,
    runs: int,
    capacity: int,
    programs: int,
    box: int,
) -> Dealt:
    """Deal out all items of some heads.

    Args:
        item, first: as in `lists.Lists`.
        groups: of a head.
        pairs: how many heads.
        held: of these, how many are computed at once.
        runs: in how many runs these are gone through at most.
        capacity: items of a run.
        programs: at most `MOST_PROGRAMS`.
        box: keys of a box.
    """
    items, device = item.shape[0], item.device
    together = triton.cdiv(pairs, held)
    wide = together * runs >= 1 << (31 - _COST_BITS)
    key = torch.empty(items, dtype=torch.int64 if wide else torch.int32, device=device)
    launch(
        _keys,
        (triton.cdiv(items, _KEYED),),
        (item, first, key),
        (items, pairs * groups, groups, held, runs, capacity, _BEGIN // box),
        WIDE=wide,
        LAST=torch.iinfo(key.dtype).max,
        BT=_KEYED,
        num_warps=4,
    )
    key, order = key.sort(stable=True)
    following = torch.empty(items, dtype=torch.int32, device=device)
    start = torch.empty(together, runs, programs, dtype=torch.int32, device=device)
    launch(
        _deal,
        (runs, together),
        (key, order, first, following, start),
        (groups, held, pairs, capacity, programs),
        MANY=_MANY,
        BP=MOST_PROGRAMS,
        num_warps=4,
    )
    return Dealt(start, following)


def specimens() -> list[Specimen]:
    """The kernels as they are launched."""
    types = dict.fromkeys(("item_ptr", "first_ptr", "key_ptr", "next_ptr", "start_ptr"), "*i32") | {
        "order_ptr": "*i64"
    }
    launches: list[tuple[Any, dict[str, Any]]] = [
        (_keys, {"WIDE": False, "LAST": 2**31 - 1, "BT": _KEYED}),
        (_deal, {"MANY": _MANY, "BP": MOST_PROGRAMS}),
    ]
    return alike(launches, types)
