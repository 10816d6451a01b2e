"""Selection by gates in Triton: the cut is guessed, then counted, and nothing is sorted.

The gates are never stored: every pass makes them anew, which takes ``2 D`` operations a pair where
keeping them would take 8 bytes of traffic. Normalised, they are whole numbers of 24 bits, as fine
as fp32 can tell gates apart, and their sums are exact and the same in any order. Some of the tokens
tell about where the smallest gate that is selected must be; one pass over all of them counts the
gates of every value around there, and sums those above. That gives the cut, and how many of the
gates that equal it are selected; the first ones are. Where the guess was wrong, the cut is searched
by its digits: two passes find the first eight bits, four at a time, a third counts by the last 16.
The host reads nothing; passes that are not needed end at once.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed
from dit_accel.kernels.token_select.choose import select_kernel, settle_kernel
from dit_accel.kernels.token_select.cut import (
    State,
    cut_kernel,
    digit_kernel,
    scale_kernel,
    split_kernel,
    summed_kernel,
)
from dit_accel.kernels.token_select.gates import BITS, TOP, gates, own_range, tokens, values
from dit_accel.kernels.words import Words, grouping

_BINS = 16
_TAIL = 16
"""Bits that the last pass of the search counts."""
_AROUND = 18
"""Bits of the values that are counted around the guess."""
_CHUNK = 4096
"""Values whose counts are summed by one program."""
_IN_NO_ORDER = tl.constexpr(triton.__version__.startswith(("3.6.", "3.7.", "3.8.")))
"""Whether Triton can be told that the order of numbers is all the same; later releases warn."""
_SPLIT = 1024
"""Numbers that one program splits."""
_SAMPLES = ((17, 1 << 14), (5, 1 << 12), (1, 0))
"""Every which token the guess looks at, from how many tokens on."""
_MARGIN = 0.25
"""How far beyond the range of their gates others may lie, as a share of it."""


@triton.jit(do_not_specialize=["heads", "length", "blocks", "columns", "start", "stop", "step"])
def _range(
    q_ptr, mean_ptr, fine_ptr, full_ptr, done_ptr, low_ptr, high_ptr,
    q_b, q_h, q_l, full_b, full_h, heads, length, blocks, columns, start, stop, step,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The least and the largest gate of a tile of tokens, every ``step``-th."""
    pair = tl.program_id(1).to(tl.int64)
    if tl.load(done_ptr + pair) != 0:
        return
    b, h = pair // heads, pair % heads
    _token, there, query = tokens(q_ptr + b * q_b + h * q_h, q_l, start, stop, length, step, D, BM)
    mean_ptr += pair * blocks * D
    fine_ptr += pair * blocks * D
    full_ptr += b * full_b + h * full_h
    low = tl.full([BM], float("inf"), tl.float32)
    high = tl.full([BM], float("-inf"), tl.float32)
    for first in range(0, columns, BN):
        column = first + tl.arange(0, BN)
        gate, _number, full = gates(
            query, mean_ptr, fine_ptr, full_ptr, column, column < columns, 0.0, 0.0, D, SPLIT
        )
        counts = there[:, None] & full[None, :]
        low = tl.minimum(low, tl.min(tl.where(counts, gate, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(counts, gate, float("-inf")), 1))
    where = pair * tl.num_programs(0) + tl.program_id(0)
    tl.store(low_ptr + where, tl.min(low, 0))
    tl.store(high_ptr + where, tl.max(high, 0))


@triton.jit(
    do_not_specialize=["heads", "length", "blocks", "columns", "start", "stop", "shift", "step"]
)
def _digits(
    q_ptr, mean_ptr, fine_ptr, full_ptr, own_ptr, scale_ptr, least_ptr, base_ptr, done_ptr, sum_ptr,
    q_b, q_h, q_l, full_b, full_h, own_b, own_h,
    heads, length, blocks, columns, start, stop, shift, step,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    COUNT: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Sums of a tile by the digit after ``base``; of everything, and of what is selected anyway."""
    pair = tl.program_id(1).to(tl.int64)
    if tl.load(done_ptr + pair) != 0:
        return
    b, h = pair // heads, pair % heads
    token, there, query = tokens(q_ptr + b * q_b + h * q_h, q_l, start, stop, length, step, D, BM)
    own = tl.load(own_ptr + b * own_b + h * own_h + token, mask=there, other=-1).to(tl.int32)
    mean_ptr += pair * blocks * D
    fine_ptr += pair * blocks * D
    full_ptr += b * full_b + h * full_h
    low, scale = tl.load(scale_ptr + 2 * pair), tl.load(scale_ptr + 2 * pair + 1)
    base, least = tl.load(base_ptr + pair).to(tl.int32), tl.load(least_ptr + pair).to(tl.int32)
    lane = tl.arange(0, 2 * BINS)
    sums = tl.zeros([BM, 2 * BINS], tl.int64)
    for first in range(0, columns, BN):
        column = first + tl.arange(0, BN)
        _gate, number, full = gates(
            query, mean_ptr, fine_ptr, full_ptr, column, column < columns, low, scale, D, SPLIT
        )
        counts = there[:, None] & full[None, :]
        worth = tl.where(counts, 1 if COUNT else number - least, 0)
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


@triton.jit
def _tally(count_ptr, value, BM: tl.constexpr, BN: tl.constexpr):
    """Count values that are not negative."""
    # in no order, so that nothing has to change hands between threads
    value = tl.reshape(value, [BM * BN], can_reorder=_IN_NO_ORDER)
    tl.atomic_add(count_ptr + value, 1, mask=value >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["heads", "length", "blocks", "columns", "start", "stop"])
def _tails(
    q_ptr, mean_ptr, fine_ptr, full_ptr, own_ptr, scale_ptr, base_ptr, done_ptr, count_ptr,
    q_b, q_h, q_l, full_b, full_h, own_b, own_h,
    heads, length, blocks, columns, start, stop,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """How many gates there are of each value after ``base``."""
    pair = tl.program_id(1).to(tl.int64)
    if tl.load(done_ptr + pair) != 0:
        return
    b, h = pair // heads, pair % heads
    token, there, query = tokens(q_ptr + b * q_b + h * q_h, q_l, start, stop, length, 1, D, BM)
    own = tl.load(own_ptr + b * own_b + h * own_h + token, mask=there, other=-1).to(tl.int32)
    mean_ptr += pair * blocks * D
    fine_ptr += pair * blocks * D
    full_ptr += b * full_b + h * full_h
    low, scale = tl.load(scale_ptr + 2 * pair), tl.load(scale_ptr + 2 * pair + 1)
    base = tl.load(base_ptr + pair).to(tl.int32)
    count_ptr += pair << TAIL
    for first in range(0, columns, BN):
        column = first + tl.arange(0, BN)
        _gate, number, full = gates(
            query, mean_ptr, fine_ptr, full_ptr, column, column < columns, low, scale, D, SPLIT
        )
        some = there[:, None] & full[None, :] & (column[None, :] != own[:, None])
        some = some & (number >= base) & (number - base < 1 << TAIL)
        _tally(count_ptr, tl.where(some, number - base, -1), BM, BN)


@triton.jit(do_not_specialize=["heads", "length", "blocks", "columns", "start", "stop"])
def _around(
    q_ptr, mean_ptr, fine_ptr, full_ptr, own_ptr, scale_ptr, base_ptr, sum_ptr, count_ptr,
    q_b, q_h, q_l, full_b, full_h, own_b, own_h,
    heads, length, blocks, columns, start, stop,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    COUNT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """How many gates there are of each value from ``base`` on, and sums and counts of a tile.

    Of all blocks, of own ones, and of others beyond the values that are counted; then the least and
    the largest value of all.
    """
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    token, there, query = tokens(q_ptr + b * q_b + h * q_h, q_l, start, stop, length, 1, D, BM)
    own = tl.load(own_ptr + b * own_b + h * own_h + token, mask=there, other=-1).to(tl.int32)
    mean_ptr += pair * blocks * D
    fine_ptr += pair * blocks * D
    full_ptr += b * full_b + h * full_h
    low, scale = tl.load(scale_ptr + 2 * pair), tl.load(scale_ptr + 2 * pair + 1)
    base = tl.load(base_ptr + pair).to(tl.int32)
    count_ptr += pair << BITS
    have = tl.full([BM], -1, tl.int32)  # a token has one own block
    every, columns_full = tl.zeros([BM], tl.int64), 0
    above, above_count = tl.zeros([BM], tl.int64), tl.zeros([BM], tl.int32)
    least = tl.full([BM], TOP + 1, tl.int32)
    most = tl.full([BM], -1, tl.int32)
    lowest, highest = own_range(there, own, full_ptr, columns)
    for first in range(0, columns, BN):
        column = first + tl.arange(0, BN)
        known = column < columns
        _gate, value = values(query, mean_ptr, fine_ptr, column, known, low, scale, D, SPLIT)
        # what lies beyond the ends is found by the least and the most
        number = value.to(tl.int32)
        beyond = number - base
        if (first + BN <= columns) & ((highest < first) | (lowest >= first + BN)):
            least = tl.minimum(least, tl.min(number, 1))
            most = tl.maximum(most, tl.max(number, 1))
            every += tl.sum(number, 1).to(tl.int64)
            columns_full += BN
            over = tl.maximum(beyond - ((1 << BITS) - 1), 0)
            many = tl.sum(tl.minimum(over, 1), 1)
            above_count += many
            above += tl.sum(over, 1).to(tl.int64) + many.to(tl.int64) * (base + (1 << BITS) - 1)
            counted = (beyond >= 0) & (beyond < 1 << BITS)
            _tally(count_ptr, tl.where(counted, beyond, -1), BM, BN)
        else:
            mine = column[None, :] == own[:, None]
            full = tl.load(full_ptr + column, mask=known, other=0) != 0
            some = full[None, :] & there[:, None]
            least = tl.minimum(least, tl.min(tl.where(some, number, TOP + 1), 1))
            most = tl.maximum(most, tl.max(tl.where(some, number, -1), 1))
            every += tl.sum(tl.where(some, number, 0), 1).to(tl.int64)
            columns_full += tl.sum(full.to(tl.int32), 0)
            have = tl.maximum(have, tl.max(tl.where(some & mine, number, -1), 1))
            some = some & (mine == 0)
            far = some & (beyond >= 1 << BITS)
            above += tl.sum(tl.where(far, number, 0), 1).to(tl.int64)
            above_count += tl.sum(far.to(tl.int32), 1)
            counted = some & (beyond >= 0) & (beyond < 1 << BITS)
            _tally(count_ptr, tl.where(counted, beyond, -1), BM, BN)
    at = sum_ptr + (pair * tl.num_programs(0) + tl.program_id(0)) * 8
    tl.store(at, tl.sum(every, 0))
    tl.store(at + 1, tl.sum(tl.maximum(have, 0).to(tl.int64), 0))
    tl.store(at + 2, tl.sum(above, 0))
    tl.store(at + 3, tl.sum(there.to(tl.int64), 0) * columns_full)
    tl.store(at + 4, tl.sum((have >= 0).to(tl.int64), 0))
    tl.store(at + 5, tl.sum(above_count, 0).to(tl.int64))
    tl.store(at + 6, tl.min(least, 0).to(tl.int64))
    tl.store(at + 7, tl.max(most, 0).to(tl.int64))


_NARROW = [_digits, _around, _tails, select_kernel, settle_kernel]
"""Kernels that take 32 blocks at once, whatever the others take."""
_OPTIONS = {"num_warps": 8, "num_stages": 2, "maxnreg": 128}
"""Two programs share a processor."""


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
) -> Words:
    batch, heads, length, _ = q.shape
    if num_video == 0 or length <= text_span[1] - text_span[0]:
        return Words.full((batch, heads, length, k_mean.shape[2]), q.device)
    q = q if q.stride(3) == 1 else q.contiguous()
    split = q.dtype != torch.float32
    mean = fine = k_mean.contiguous()
    if split:
        mean, fine = (torch.empty_like(k_mean, dtype=q.dtype) for _ in range(2))
        size = k_mean.numel()
        launch(
            split_kernel,
            (triton.cdiv(size, _SPLIT),),
            (k_mean.contiguous(), mean, fine),
            (size,),
            BT=_SPLIT,
            num_warps=4,
        )
    full, own = full.contiguous(), own.contiguous()
    passes = _Gates(q, mean, fine, own, full, num_video, text_span, split)
    count = mode == "topk"
    return passes.selected(passes.cut(threshold, count))


class _Gates:
    """The passes over the gates of all heads."""

    def __init__(
        self,
        q: Tensor,
        mean: Tensor,
        fine: Tensor,
        own: Tensor,
        full: Tensor,
        num_video: int,
        text_span: tuple[int, int],
        split: bool,
    ) -> None:
        self.batch, self.heads, self.length, self.depth = q.shape
        self.blocks, self.pairs = mean.shape[2], q.shape[0] * q.shape[1]
        self.device, self.split = q.device, split
        self.operands = q, mean, fine, full
        self.tile = (128, 64) if split else (64, 32)
        self.tiles = triton.cdiv(self.length, self.tile[0])
        start, stop = text_span if text_span[1] > text_span[0] else (self.length, self.length)
        sizes = (self.heads, self.length, self.blocks, num_video, start, stop)
        strides = (*q.stride()[:3], *lead_strides(full))
        self.own = own
        self.range_of = (*strides, *sizes)
        self.where = (*strides, *lead_strides(own), *sizes)

    def _range(self, state: State, step: int, margin: float) -> None:
        """What gates of 0 and of the largest number are, and which number the least one is.

        Args:
            state: heads that are done stay as they are.
            step: every which token is looked at.
            margin: what is left on both sides, as a share of the range that was found.
        """
        tiles = triton.cdiv(triton.cdiv(self.length, step), self.tile[0])
        low, high = self.room(2, self.pairs, tiles, dtype=torch.float32)
        self.launch(_range, (state.done, low, high), (*self.range_of, step), step=step)
        launch(
            scale_kernel,
            (self.pairs,),
            (low, high, state.done, state.scale, state.least),
            (tiles, margin),
            BT=128,
            num_warps=4,
        )

    def room(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def launch(
        self,
        kernel: Any,
        pointers: tuple[Tensor, ...],
        sizes: tuple[int, ...],
        step: int = 1,
        **constants: Any,
    ) -> None:
        tiles = triton.cdiv(triton.cdiv(self.length, step), self.tile[0])
        launch(
            kernel,
            (tiles, self.pairs),
            (*self.operands, *pointers),
            sizes,
            D=self.depth,
            BM=self.tile[0],
            BN=32 if kernel in _NARROW else self.tile[1],
            SPLIT=self.split,
            **(_OPTIONS if self.split else {"num_warps": 4, "num_stages": 2}),
            **constants,
        )

    def cut(self, threshold: float, count: bool) -> State:
        """The smallest gate that is selected, and how many of its equals."""
        state = State.of(self.pairs, threshold, _AROUND, _TAIL, self.device)
        # about where the cut is, to 8 bits, and what is counted around there
        step = next(step for step, least in _SAMPLES if self.length >= least)
        self._range(state, step, _MARGIN)
        self._digits(state, count, step, (1 << (BITS - 9)) - (1 << (_AROUND - 1)))
        sums = self.room(self.pairs, self.tiles, 8, dtype=torch.int64)
        self._last(state, count, _around, sums)
        # where the guess was wrong
        self._range(state, 1, 0.0)
        self._digits(state, count, 1, 0)
        self._last(state, count, _tails, sums)
        return state

    def _digits(self, state: State, count: bool, step: int, ahead: int) -> None:
        """Of every ``step``-th token: 8 bits of the cut, what is above, what is wanted."""
        tiles = triton.cdiv(triton.cdiv(self.length, step), self.tile[0])
        sums = self.room(self.pairs, tiles, 2 * _BINS, dtype=torch.int64)
        for shift in (BITS - 4, BITS - 8):
            first = shift == BITS - 4
            base = state.zero if first else state.base
            self.launch(
                _digits,
                (self.own, state.scale, state.least, base, state.done, sums),
                (*self.where, shift, step),
                step=step,
                COUNT=count,
                BINS=_BINS,
            )
            launch(
                digit_kernel,
                (self.pairs,),
                (sums, state.share, state.done, state.base, state.have, state.wanted),
                (tiles, shift, 0 if first else ahead),
                COUNT=count,
                FIRST=first,
                BINS=_BINS,
                BT=32,
                num_warps=4,
            )

    def _last(self, state: State, count: bool, kernel: Any, sums: Tensor) -> None:
        """Count the values from the base on, and find the cut among them."""
        guessed = kernel is _around
        counts, bits = (state.around, _AROUND) if guessed else (state.tail, _TAIL)
        parts = (1 << bits) // _CHUNK
        if guessed:
            pointers = (self.own, state.scale, state.base, sums, counts)
            self.launch(_around, pointers, self.where, COUNT=count, BITS=bits)
        else:
            pointers = (self.own, state.scale, state.base, state.done, counts)
            self.launch(_tails, pointers, self.where, TAIL=bits)
        summed = self.room(self.pairs, parts, 2, dtype=torch.int64)
        launch(
            summed_kernel,
            (parts, self.pairs),
            (counts, state.base, state.done, summed),
            CHUNK=_CHUNK,
            num_warps=4,
        )
        launch(
            cut_kernel,
            (self.pairs,),
            (
                *(counts, summed, state.base, sums, state.share, state.have, state.wanted),
                *(state.done, state.cut, state.needed),
            ),
            (self.tiles, self.length * self.blocks),
            COUNT=count,
            GUESSED=guessed,
            PARTS=parts,
            CHUNK=_CHUNK,
            BT=32,
            num_warps=4,
        )

    def selected(self, state: State) -> Words:
        """What is above the cut, and of its equals the first."""
        ties = self.room(self.pairs, self.tiles, dtype=torch.int32)
        groups, size = grouping(self.blocks)
        word = self.room(self.batch, self.heads, groups, self.length, dtype=torch.int16)
        sizes = (*self.where, groups, size)
        about = (self.own, state.scale, state.cut, ties)
        self.launch(select_kernel, (*about, word), sizes)
        self.launch(settle_kernel, (*about, state.needed, word), sizes)
        return Words(word, self.blocks)


def _specimens(depth: int, dtype: str) -> list[Specimen]:
    data = f"*{dtype}"
    types = {
        **dict.fromkeys(("q_ptr", "mean_ptr", "fine_ptr"), data),
        **dict.fromkeys(("low_ptr", "high_ptr", "scale_ptr", "x_ptr"), "*fp32"),
        "margin": "fp32",
        **dict.fromkeys(("own_ptr", "base_ptr", "sum_ptr", "least_ptr", "room_ptr"), "*i64"),
        **dict.fromkeys(("have_ptr", "cut_ptr", "needed_ptr", "summed_ptr"), "*i64"),
        **dict.fromkeys(("wanted_ptr", "share_ptr"), "*fp64"),
        **dict.fromkeys(("count_ptr", "tie_ptr", "done_ptr"), "*i32"),
        "full_ptr": "*i1",
        "word_ptr": "*i16",
    }
    tile: dict[str, Any] = {"D": depth, "BM": 128, "BN": 64, "SPLIT": True}
    kernels: list[tuple[Any, dict[str, Any]]] = [
        (split_kernel, {"BT": _SPLIT}),
        (_range, tile),
        (scale_kernel, {"BT": 128}),
        (_digits, tile | {"BN": 32, "COUNT": False, "BINS": _BINS}),
        (_around, tile | {"BN": 32, "COUNT": False, "BITS": _AROUND}),
        (summed_kernel, {"CHUNK": _CHUNK}),
        (digit_kernel, {"COUNT": False, "FIRST": True, "BINS": _BINS, "BT": 32}),
        (cut_kernel, {"COUNT": False, "GUESSED": True, "PARTS": 64, "CHUNK": _CHUNK, "BT": 32}),
        (_tails, tile | {"BN": 32, "TAIL": _TAIL}),
        (select_kernel, tile | {"BN": 32}),
        (settle_kernel, tile | {"BN": 32}),
    ]
    return [
        Specimen(
            f"{kernel.__name__} {dtype} D={depth}",
            kernel,
            typed(kernel, constants, **types),
            constants,
            _OPTIONS,
            aligned=("q_b", "q_h", "q_l"),
        )
        for kernel, constants in kernels
    ]


SPECIMENS = [*_specimens(64, "fp16"), *_specimens(128, "bf16")]
