"""The partials of a token's groups made one, some groups at a time.

What a partial weighs is known from its normaliser alone. So the normalisers of all groups are read
first, and the partials after them are added up in any order, with nothing to wait for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.specimen import Specimen, typed

LOG2E = tl.constexpr(1.4426950408889634)
ITEM_ROWS = tl.constexpr(128)
"""Tokens of an item."""
_GROUPS = 32
"""Normalisers of a token that are read at once."""
_MERGED = 4
"""Partials of a token that are read at once."""
_TOKENS = 16
"""Tokens of a program."""


@triton.jit
def _rows_of(first_ptr, pair, group, groups, held, rows, run, BY_ITEM: tl.constexpr):
    """Where the partials of a head's group begin."""
    unit = (held + pair) * groups + group
    if BY_ITEM:
        known = group < groups
        begin = tl.load(first_ptr + unit, mask=known, other=0) - tl.load(first_ptr + held * groups)
        start = begin.to(tl.int64) * ITEM_ROWS - run.to(tl.int64) * rows
    else:
        start = unit.to(tl.int64) * rows
    return unit, start


@triton.jit(
    do_not_specialize=["length", "rows", "groups", "first_pair", "held", "run", "first", "last"]
)
def merge_kernel(
    part_ptr,
    part_lse_ptr,
    place_ptr,
    first_ptr,
    acc_ptr,
    peak_ptr,
    total_ptr,
    out_ptr,
    lse_ptr,
    length,
    rows,
    groups,
    first_pair,
    held,
    run,
    first,
    last,
    D: tl.constexpr,
    BT: tl.constexpr,
    BG: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BY_ITEM: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    if BY_ITEM:
        # more than one run only where it is one head
        items = tl.load(first_ptr + (held + tl.num_programs(1)) * groups)
        items -= tl.load(first_ptr + held * groups)
        ends = items.to(tl.int64) * ITEM_ROWS
        done = run.to(tl.int64) * rows
        if (done >= ends) & (run > 0):
            return
        first = (run == 0).to(tl.int32)
        last = (done + rows >= ends).to(tl.int32)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = token < length
    depth = tl.arange(0, D)
    kept = pair * length + token
    goes_on = inside & (tl.full([BT], 0, tl.int32) == first)
    peak = tl.load(peak_ptr + kept, mask=goes_on, other=float("-inf"))
    total = tl.load(total_ptr + kept, mask=goes_on, other=0.0)
    before = peak
    for start in range(0, groups, BG):
        group = start + tl.arange(0, BG)
        unit, begin = _rows_of(first_ptr, pair, group, groups, held, rows, run, BY_ITEM)
        here = inside[:, None] & (group < groups)[None, :]
        place = tl.load(place_ptr + unit[None, :] * length + token[:, None], mask=here, other=-1)
        where = begin[None, :] + place
        has = place >= 0
        if BY_ITEM:
            has = has & (where >= 0) & (where < rows)
        lse = tl.load(part_lse_ptr + where, mask=has, other=float("-inf"))
        new = tl.maximum(peak, tl.max(lse, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(lse - base[:, None]), 1)
        peak = new
    base = tl.where(peak == float("-inf"), 0.0, peak)
    acc = tl.load(acc_ptr + kept[:, None] * D + depth[None, :], mask=goes_on[:, None], other=0.0)
    acc *= tl.exp2(before - base)[:, None]
    for start in range(0, groups, AT_ONCE):
        # all of them are on their way before the first is waited for
        rows_of = ()
        for i in tl.static_range(AT_ONCE):
            group = tl.full([1], start + i, tl.int32)
            unit, begin = _rows_of(first_ptr, pair, group, groups, held, rows, run, BY_ITEM)
            here = inside & (group < groups)
            place = tl.load(place_ptr + unit * length + token, mask=here, other=-1)
            where = tl.where(place >= 0, begin + place, -1)
            rows_of = rows_of + (where,)  # type: ignore[assignment]  # noqa: RUF005
        logs, parts = (), ()
        for i in tl.static_range(AT_ONCE):
            where = rows_of[i]
            has = where >= 0
            if BY_ITEM:
                has = has & (where < rows)
            lse = tl.load(part_lse_ptr + where, mask=has, other=float("-inf"))
            row = part_ptr + where[:, None] * D + depth[None, :]
            part = tl.load(row, mask=has[:, None], other=0.0)
            logs = logs + (lse,)  # type: ignore[assignment]  # noqa: RUF005
            parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(AT_ONCE):
            acc += parts[i].to(tl.float32) * tl.exp2(logs[i] - base)[:, None]
    if last:
        where = (first_pair + held + pair) * length + token
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(
            out_ptr + where[:, None] * D + depth[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=inside[:, None],
        )
        tl.store(lse_ptr + where, (peak + tl.log2(total)) / LOG2E, mask=inside)
    else:
        tl.store(acc_ptr + kept[:, None] * D + depth[None, :], acc, mask=inside[:, None])
        tl.store(peak_ptr + kept, peak, mask=inside)
        tl.store(total_ptr + kept, total, mask=inside)


class State(NamedTuple):
    """What earlier groups made and later ones go on from, fp32.

    ``acc`` ``[P, L, D]``, ``peak`` and ``total`` ``[P, L]``.
    """

    acc: Tensor
    peak: Tensor
    total: Tensor

    @classmethod
    def of(cls, pairs: int, length: int, depth: int, device: torch.device) -> State:
        acc = torch.empty(pairs, length, depth, dtype=torch.float32, device=device)
        peak, total = torch.empty(2, pairs, length, dtype=torch.float32, device=device)
        return cls(acc, peak, total)


def merge_parts(
    part: Tensor,
    part_lse: Tensor,
    place: Tensor,
    state: State | None,
    out: Tensor,
    lse: Tensor,
    groups: int,
    first_pair: int,
    pairs: int,
    *,
    first: bool,
    last: bool,
) -> None:
    """Merge the partials of some heads' tokens.

    Args:
        part, part_lse: ``[U, R, D]`` and ``[U, R]``, log of the normaliser to the base 2.
        place: int32 ``[U, L]``, which of the ``R`` is a token's, or -1.
        state: of these heads; ``None`` where these are all groups.
        out, lse: ``[B, H, L, D]`` and ``[B, H, L]``, written with the last groups.
        groups: of these heads, ``U = P · groups``.
        first_pair: ``b · H + h`` of the first head.
        pairs: how many.
        first, last: whether no groups came before, and none come after.
    """
    _launch(
        part, part_lse, place, place, state, out, lse, part.shape[1], groups, first_pair, 0, pairs,
        0, int(first), int(last), by_item=False,
    )  # fmt: skip


def merge_items(
    part: Tensor,
    part_lse: Tensor,
    place: Tensor,
    first: Tensor,
    state: State | None,
    out: Tensor,
    lse: Tensor,
    groups: int,
    first_pair: int,
    held: int,
    pairs: int,
    run: int,
) -> None:
    """Merge the partials of some heads' tokens, of one run of their items.

    Runs that hold none, after others, do nothing; the last one that holds some writes the result.

    Args:
        part, part_lse: ``[R, D]`` and ``[R]``, of as many items as there is room for; log of the
            normaliser to the base 2.
        place: int32 ``[U, L]``, where a token is among those of a unit, or -1.
        first: int32 ``[U + 1]``, the first item of every unit.
        state: of one head; ``None`` where there is one run.
        out, lse: ``[B, H, L, D]`` and ``[B, H, L]``.
        groups: of a head, ``U = P · groups``.
        first_pair: ``b · H + h`` of the first head that there are lists of.
        held: which of these is the first one here.
        pairs: how many.
        run: which of the runs.
    """
    _launch(
        part, part_lse, place, first, state, out, lse, part_lse.shape[0], groups, first_pair, held,
        pairs, run, 0, 0, by_item=True,
    )  # fmt: skip


def _launch(
    part: Tensor,
    part_lse: Tensor,
    place: Tensor,
    first: Tensor,
    state: State | None,
    out: Tensor,
    lse: Tensor,
    rows: int,
    groups: int,
    first_pair: int,
    held: int,
    pairs: int,
    run: int,
    starts: int,
    ends: int,
    *,
    by_item: bool,
) -> None:
    length, depth = out.shape[2:]
    launch(
        merge_kernel,
        (triton.cdiv(length, _TOKENS), pairs),
        (part, part_lse, place, first, *((lse, lse, lse) if state is None else state), out, lse),
        (length, rows, groups, first_pair, held, run, starts, ends),
        D=depth,
        BT=_TOKENS,
        BG=_GROUPS,
        AT_ONCE=_MERGED,
        BY_ITEM=by_item,
        num_warps=4,
    )


def specimens(depth: int, dtype: str) -> list[Specimen]:
    """The kernel as it is launched."""
    types = {
        **dict.fromkeys(("part_ptr", "out_ptr"), f"*{dtype}"),
        **dict.fromkeys(("part_lse_ptr", "acc_ptr", "peak_ptr", "total_ptr", "lse_ptr"), "*fp32"),
        **dict.fromkeys(("place_ptr", "first_ptr"), "*i32"),
    }
    made = []
    for by_item in (True, False):
        constants = {"D": depth, "BT": _TOKENS, "BG": _GROUPS, "AT_ONCE": _MERGED}
        constants |= {"BY_ITEM": by_item}
        signature = typed(merge_kernel, constants, **types)
        name = f"merge {dtype} D={depth}{' by item' if by_item else ''}"
        made.append(Specimen(name, merge_kernel, signature, constants, {"num_warps": 4}))
    return made
