"""Selection by gates in Triton: the cut is searched by its digits, and nothing is sorted.

The gates are never stored: every pass makes them anew, which takes ``2 D`` operations a pair where
keeping them would take 8 bytes of traffic. Normalised, they are whole numbers of 24 bits, as fine
as fp32 can tell gates apart, and their sums are exact and the same in any order. Two passes find
the first and the second four bits of the smallest gate that is selected; what has these is counted
by its last 16 bits, which tells the cut and how many of the gates that equal it are selected; the
first ones are. The host reads nothing.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed

BITS = 24
TOP = tl.constexpr(2**BITS - 1)
_BINS = 16
_TAIL = 16
"""Bits that the last pass counts."""


@triton.jit
def _gates(query, mean_ptr, fine_ptr, full_ptr, first, columns, low, scale,
           D: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Gates ``[BM, BN]`` as whole numbers, or as they are if ``scale`` is 0; which blocks count."""
    column = first + tl.arange(0, BN)
    depth = tl.arange(0, D)
    inside = column < columns
    where = column[None, :] * D + depth[:, None]
    mean = tl.load(mean_ptr + where, mask=inside[None, :], other=0.0)
    gate = tl.dot(query, mean, input_precision="ieee")
    if SPLIT:
        fine = tl.load(fine_ptr + where, mask=inside[None, :], other=0.0)
        gate = tl.dot(query, fine, gate)
    full = tl.load(full_ptr + column, mask=inside, other=0) != 0
    number = tl.minimum(tl.maximum((gate - low) * scale + 0.5, 0.0), TOP).to(tl.int32)
    return gate, number, column, full


@triton.jit
def _tokens(q_ptr, q_l, start, stop, length, D: tl.constexpr, BM: tl.constexpr):
    """A tile of queries, and which of them select."""
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    there = (token < length) & ((token < start) | (token >= stop))
    depth = tl.arange(0, D)
    query = tl.load(
        q_ptr + token.to(tl.int64)[:, None] * q_l + depth[None, :], mask=there[:, None], other=0.0
    )
    return token, there, query


@triton.jit(do_not_specialize=["heads", "length", "blocks", "columns", "start", "stop"])
def _range(
    q_ptr, mean_ptr, fine_ptr, full_ptr, low_ptr, high_ptr,
    q_b, q_h, q_l, full_b, full_h, heads, length, blocks, columns, start, stop,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The least and the largest gate of a tile of tokens."""
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    _token, there, query = _tokens(q_ptr + b * q_b + h * q_h, q_l, start, stop, length, D, BM)
    mean_ptr += pair * blocks * D
    fine_ptr += pair * blocks * D
    full_ptr += b * full_b + h * full_h
    low = tl.full([BM], float("inf"), tl.float32)
    high = tl.full([BM], float("-inf"), tl.float32)
    for first in range(0, columns, BN):
        gate, _number, _column, full = _gates(
            query, mean_ptr, fine_ptr, full_ptr, first, columns, 0.0, 0.0, D, BN, SPLIT
        )
        counts = there[:, None] & full[None, :]
        low = tl.minimum(low, tl.min(tl.where(counts, gate, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(counts, gate, float("-inf")), 1))
    where = pair * tl.num_programs(0) + tl.program_id(0)
    tl.store(low_ptr + where, tl.min(low, 0))
    tl.store(high_ptr + where, tl.max(high, 0))


@triton.jit(do_not_specialize=["heads", "length", "blocks", "columns", "start", "stop", "shift"])
def _digits(
    q_ptr, mean_ptr, fine_ptr, full_ptr, own_ptr, scale_ptr, base_ptr, sum_ptr,
    q_b, q_h, q_l, full_b, full_h, own_b, own_h,
    heads, length, blocks, columns, start, stop, shift,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    COUNT: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Sums of a tile by the digit after ``base``; of everything, and of what is selected anyway."""
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    token, there, query = _tokens(q_ptr + b * q_b + h * q_h, q_l, start, stop, length, D, BM)
    own = tl.load(own_ptr + b * own_b + h * own_h + token, mask=there, other=-1)
    mean_ptr += pair * blocks * D
    fine_ptr += pair * blocks * D
    full_ptr += b * full_b + h * full_h
    low, scale = tl.load(scale_ptr + 2 * pair), tl.load(scale_ptr + 2 * pair + 1)
    base = tl.load(base_ptr + pair).to(tl.int32)
    lane = tl.arange(0, 2 * BINS)
    sums = tl.zeros([BM, 2 * BINS], tl.int64)
    for first in range(0, columns, BN):
        _gate, number, column, full = _gates(
            query, mean_ptr, fine_ptr, full_ptr, first, columns, low, scale, D, BN, SPLIT
        )
        counts = there[:, None] & full[None, :]
        worth = tl.where(counts, 1 if COUNT else number, 0)
        mine = column[None, :] == own[:, None]
        digit = tl.where(mine | (number < base), 2 * BINS, (number - base) >> shift)
        total = tl.sum(worth, 1)
        have = tl.sum(tl.where(mine, worth, 0), 1)
        part = tl.where(lane[None, :] == BINS, total[:, None], 0)
        part = tl.where(lane[None, :] == BINS + 1, have[:, None], part)
        for d in tl.static_range(BINS):
            some = tl.sum(tl.where(digit == d, worth, 0), 1)
            part = tl.where(lane[None, :] == d, some[:, None], part)
        sums += part.to(tl.int64)
    where = pair * tl.num_programs(0) + tl.program_id(0)
    tl.store(sum_ptr + where * 2 * BINS + lane, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["heads", "length", "blocks", "columns", "start", "stop"])
def _tails(
    q_ptr, mean_ptr, fine_ptr, full_ptr, own_ptr, scale_ptr, base_ptr, count_ptr,
    q_b, q_h, q_l, full_b, full_h, own_b, own_h,
    heads, length, blocks, columns, start, stop,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """How many gates there are of each value after ``base``."""
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    token, there, query = _tokens(q_ptr + b * q_b + h * q_h, q_l, start, stop, length, D, BM)
    own = tl.load(own_ptr + b * own_b + h * own_h + token, mask=there, other=-1)
    mean_ptr += pair * blocks * D
    fine_ptr += pair * blocks * D
    full_ptr += b * full_b + h * full_h
    low, scale = tl.load(scale_ptr + 2 * pair), tl.load(scale_ptr + 2 * pair + 1)
    base = tl.load(base_ptr + pair).to(tl.int32)
    count_ptr += pair << TAIL
    for first in range(0, columns, BN):
        _gate, number, column, full = _gates(
            query, mean_ptr, fine_ptr, full_ptr, first, columns, low, scale, D, BN, SPLIT
        )
        some = there[:, None] & full[None, :] & (column[None, :] != own[:, None])
        some = some & (number >= base) & (number - base < 1 << TAIL)
        tl.atomic_add(count_ptr + (number - base), 1, mask=some, sem="relaxed")


@triton.jit(do_not_specialize=["heads", "length", "blocks", "columns", "start", "stop"])
def _ties(
    q_ptr, mean_ptr, fine_ptr, full_ptr, own_ptr, scale_ptr, base_ptr, tie_ptr,
    q_b, q_h, q_l, full_b, full_h, own_b, own_h,
    heads, length, blocks, columns, start, stop,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """How many gates of each token equal the cut."""
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    token, there, query = _tokens(q_ptr + b * q_b + h * q_h, q_l, start, stop, length, D, BM)
    own = tl.load(own_ptr + b * own_b + h * own_h + token, mask=there, other=-1)
    mean_ptr += pair * blocks * D
    fine_ptr += pair * blocks * D
    full_ptr += b * full_b + h * full_h
    low, scale = tl.load(scale_ptr + 2 * pair), tl.load(scale_ptr + 2 * pair + 1)
    cut = tl.load(base_ptr + pair).to(tl.int32)
    ties = tl.zeros([BM], tl.int32)
    for first in range(0, columns, BN):
        _gate, number, column, full = _gates(
            query, mean_ptr, fine_ptr, full_ptr, first, columns, low, scale, D, BN, SPLIT
        )
        tie = there[:, None] & full[None, :] & (column[None, :] != own[:, None]) & (number == cut)
        ties += tl.sum(tie.to(tl.int32), 1)
    tl.store(tie_ptr + pair * length + token, ties, mask=token < length)


@triton.jit(do_not_specialize=["heads", "length", "blocks", "columns", "start", "stop"])
def _select(
    q_ptr, mean_ptr, fine_ptr, full_ptr, own_ptr, scale_ptr, base_ptr, before_ptr, room_ptr,
    out_ptr, q_b, q_h, q_l, full_b, full_h, own_b, own_h,
    heads, length, blocks, columns, start, stop,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    token, there, query = _tokens(q_ptr + b * q_b + h * q_h, q_l, start, stop, length, D, BM)
    own = tl.load(own_ptr + b * own_b + h * own_h + token, mask=there, other=-1)
    mean_ptr += pair * blocks * D
    fine_ptr += pair * blocks * D
    full_ptr += b * full_b + h * full_h
    low, scale = tl.load(scale_ptr + 2 * pair), tl.load(scale_ptr + 2 * pair + 1)
    cut = tl.load(base_ptr + pair).to(tl.int32)
    room = tl.load(room_ptr + pair)
    before = tl.load(before_ptr + pair * length + token, mask=token < length, other=0)
    out_ptr += (pair * length + token)[:, None] * blocks
    for first in range(0, blocks, BN):
        _gate, number, column, full = _gates(
            query, mean_ptr, fine_ptr, full_ptr, first, columns, low, scale, D, BN, SPLIT
        )
        mine = column[None, :] == own[:, None]
        can = there[:, None] & full[None, :] & (column[None, :] != own[:, None])
        tie = (can & (number == cut)).to(tl.int32)
        rank = before[:, None] + tl.cumsum(tie, 1) - tie
        taken = (can & (number > cut)) | ((tie > 0) & (rank < room)) | mine
        # text selects everything, and everything selects text
        taken = taken | (column >= columns)[None, :] | (there[:, None] == 0)
        mask = (token < length)[:, None] & (column < blocks)[None, :]
        tl.store(out_ptr + column[None, :], taken.to(tl.int8), mask=mask)
        before += tl.sum(tie, 1)


def token_select(
    q: Tensor,
    k_mean: Tensor,
    own: Tensor,
    full: Tensor,
    num_video: int,
    text_span: tuple[int, int],
    threshold: float,
    scope: Literal["head", "token"],
    mode: Literal["threshold", "topk"],
) -> Tensor:
    batch, heads, length, depth = q.shape
    blocks, pairs, device = k_mean.shape[2], batch * heads, q.device
    shape = (batch, heads, length, blocks)
    if num_video == 0 or length <= text_span[1] - text_span[0]:
        return torch.ones(shape, dtype=torch.bool, device=device)
    q = q if q.stride(3) == 1 else q.contiguous()
    split = q.dtype != torch.float32
    mean = k_mean.contiguous().to(q.dtype)
    fine = (k_mean - mean.float()).to(q.dtype) if split else mean
    fine, full, own = fine.contiguous(), full.contiguous(), own.contiguous()
    block_m, block_n = (128, 64) if split else (64, 32)
    tiles = triton.cdiv(length, block_m)
    start, stop = text_span if text_span[1] > text_span[0] else (length, length)
    sizes = (heads, length, blocks, num_video, start, stop)
    strides = (*q.stride()[:3], *lead_strides(full))

    def room(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    def launch(kernel: Any, *rest: Any, **constants: Any) -> None:
        kernel[(tiles, pairs)](
            q,
            mean,
            fine,
            full,
            *rest,
            D=depth,
            BM=block_m,
            BN=block_n if kernel in (_range, _digits) else 32,
            SPLIT=split,
            num_warps=8 if split else 4,
            num_stages=2,
            **constants,
        )

    ends = room(2, pairs, tiles, dtype=torch.float32)
    launch(_range, ends[0], ends[1], *strides, *sizes)
    low, high = ends[0].amin(-1), ends[1].amax(-1)
    span = high - low
    scale = torch.stack(
        [torch.where(span > 0, low, 0.0), torch.where(span > 0, TOP.value / span, 0.0)], -1
    ).contiguous()

    where = (*strides, *lead_strides(own), *sizes)
    count = mode == "topk"
    base = torch.zeros(pairs, dtype=torch.int64, device=device)
    have = wanted = base
    for shift in (BITS - 4, BITS - 8):
        sums = room(pairs, tiles, 2 * _BINS, dtype=torch.int64)
        launch(_digits, own, scale, base, sums, *where, shift, COUNT=count, BINS=_BINS)
        found = sums.sum(1)
        if shift == BITS - 4:
            have, wanted = found[:, _BINS + 1], found[:, _BINS].double() * threshold
            if count:
                wanted = (wanted + 1e-9).floor().clamp(min=1)
        digit, have, _ = _boundary(found[:, :_BINS], have, wanted)
        base = base + (digit << shift)
    counts = torch.zeros(pairs, 2**_TAIL, dtype=torch.int32, device=device)
    launch(_tails, own, scale, base, counts, *where, TAIL=_TAIL)
    value = base.unsqueeze(1) + torch.arange(2**_TAIL, device=device)
    each = torch.ones_like(value) if count else value
    digit, have, inside = _boundary(counts * each, have, wanted)
    base = base + digit
    # of those that equal the cut, as many as are reached before there is enough
    worth = (torch.ones_like(base) if count else base).double()
    needed = ((wanted - have) / worth.clamp(min=1)).ceil()
    needed = torch.where(worth > 0, needed, float(length) * blocks)
    needed = torch.where(inside, needed, 0.0).long()

    ties = room(pairs, length, dtype=torch.int32)
    launch(_ties, own, scale, base, ties, *where)
    before = ties.cumsum(-1, dtype=torch.int64) - ties
    select = room(*shape, dtype=torch.int8)
    launch(_select, own, scale, base, before, needed, select, *where)
    return select.view(torch.bool)


def _boundary(sums: Tensor, have: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In which bin, from the last one down, enough is reached.

    Args:
        sums: int64 ``[P, N]``, by bin.
        have: int64 ``[P]``, what there is before.
        wanted: fp64 ``[P]``.

    Returns:
        The bin int64 ``[P]``, ``N`` if there is enough before; what there is before it; whether
        it is one of the bins.
    """
    above = sums.flip(-1).cumsum(-1).flip(-1) - sums + have.unsqueeze(-1)
    needs = above.double() < wanted.unsqueeze(-1)
    number = sums.shape[-1] - needs.sum(-1)
    inside = number < sums.shape[-1]
    before = above.gather(-1, number.clamp(max=sums.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    return number, torch.where(inside, before, have), inside


def _specimens(depth: int, dtype: str) -> list[Specimen]:
    data = f"*{dtype}"
    types = {
        **dict.fromkeys(("q_ptr", "mean_ptr", "fine_ptr"), data),
        **dict.fromkeys(("low_ptr", "high_ptr", "scale_ptr"), "*fp32"),
        **dict.fromkeys(("own_ptr", "base_ptr", "sum_ptr", "before_ptr", "room_ptr"), "*i64"),
        **dict.fromkeys(("count_ptr", "tie_ptr"), "*i32"),
        "full_ptr": "*i1",
        "out_ptr": "*i8",
    }
    tile: dict[str, Any] = {"D": depth, "BM": 128, "BN": 64, "SPLIT": True}
    kernels: list[tuple[Any, dict[str, Any]]] = [
        (_range, {}),
        (_digits, {"COUNT": False, "BINS": _BINS}),
        (_tails, {"BN": 32, "TAIL": _TAIL}),
        (_ties, {"BN": 32}),
        (_select, {"BN": 32}),
    ]
    return [
        Specimen(
            f"{kernel.__name__} {dtype} D={depth}",
            kernel,
            typed(kernel, tile | more, **types),
            tile | more,
            {"num_warps": 8, "num_stages": 2},
            aligned=("q_b", "q_h", "q_l"),
        )
        for kernel, more in kernels
    ]


SPECIMENS = [*_specimens(64, "fp16"), *_specimens(128, "bf16")]
