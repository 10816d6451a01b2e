"""The order as two kernels: labels are counted by parts of a head, then every part is placed.

The same order on every run: a part's tokens are sorted in its program, and begin where the counts
of the clusters before, and of the parts before, end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.packed import Compact, remembered
from dit_accel.kernels.scan import larger
from dit_accel.kernels.specimen import Specimen, typed

_PART = 2048
"""Tokens that a program places."""
_SORTED = 512
"""Tokens that are sorted together."""


@triton.jit(do_not_specialize=["length", "clusters"])
def count_kernel(label, counts, length, clusters, PART: tl.constexpr, BINS: tl.constexpr):
    """How many tokens of a part have each label."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = part * PART + tl.arange(0, PART)
    found = tl.load(label + head * length + place, mask=place < length, other=0).to(tl.int32)
    found = tl.where(place < length, found, clusters)
    at = (head * tl.num_programs(0) + part) * BINS
    tl.store(counts + at + tl.arange(0, BINS), tl.histogram(found, BINS))


@triton.jit(do_not_specialize=["length", "clusters", "text_start", "text", "text_block"])
def place_kernel(
    label,
    counts,
    perm,
    narrow,
    bounds,
    sizes,
    length,
    clusters,
    text_start,
    text,
    text_block,
    PART: tl.constexpr,
    BINS: tl.constexpr,
    SORTED: tl.constexpr,
    SHIFT: tl.constexpr,
):
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(0)
    counts += head * parts * BINS + tl.arange(0, BINS)
    label += head * length
    perm += head * (length + text)
    narrow += head * (length + text)
    every, before = tl.zeros([BINS], tl.int32), tl.zeros([BINS], tl.int32)
    for other in range(0, parts):
        number = tl.load(counts + other * BINS)
        every += number
        before += tl.where(other < part, number, 0)
    first = tl.cumsum(every, 0) - every
    lane = tl.arange(0, SORTED)
    if part == 0:
        blocks = clusters + tl.cdiv(text, text_block)
        bounds += head * (blocks + 1)
        sizes += head * blocks
        bin = tl.arange(0, BINS)
        tl.store(bounds + bin, first, mask=bin <= clusters)
        tl.store(sizes + bin, every, mask=bin < clusters)
        for start in range(0, text, SORTED):
            word = start + lane
            tl.store(perm + length + word, (text_start + word).to(tl.int64), mask=word < text)
            tl.store(narrow + length + word, text_start + word, mask=word < text)
        for start in range(0, text, SORTED * text_block):
            begin = start + lane * text_block
            end = tl.minimum(begin + text_block, text)
            at = clusters + start // text_block + lane
            tl.store(bounds + at + 1, length + end, mask=begin < text)
            tl.store(sizes + at, end - begin, mask=begin < text)
    ahead = first + before
    for start in range(part * PART, tl.minimum(part * PART + PART, length), SORTED):
        place = start + lane
        found = tl.load(label + place, mask=place < length, other=0).to(tl.int32)
        found = tl.where(place < length, found, clusters)
        key = tl.sort((found << SHIFT) | lane)
        found, cell = key >> SHIFT, start + (key & (SORTED - 1))
        previous = tl.gather(found, tl.maximum(lane - 1, 0), 0)
        opens = tl.where((lane == 0) | (previous != found), lane, 0)
        rank = lane - tl.associative_scan(opens, 0, larger)
        target = tl.gather(ahead, found, 0) + rank
        ahead += tl.histogram(found, BINS)
        token = cell + tl.where(cell < text_start, 0, text)
        tl.store(perm + target, token.to(tl.int64), mask=found < clusters)
        tl.store(narrow + target, token, mask=found < clusters)


def label_order(
    labels: Tensor, clusters: int, text: tuple[int, int], text_block: int
) -> tuple[Tensor, Tensor]:
    labels = labels.contiguous()
    batch, heads, length = labels.shape
    words = text[1] - text[0]
    blocks = clusters - -words // text_block
    parts, bins = max(1, -(-length // _PART)), max(64, triton.next_power_of_2(clusters + 1))

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty((batch, heads, *shape), dtype=dtype, device=labels.device)

    counts, perm = new(parts, bins), new(length + words, dtype=torch.int64)
    narrow, offsets, sizes = new(length + words), new(blocks + 1), new(blocks)
    grid, constants = (parts, batch * heads), {"PART": _PART, "BINS": bins}
    launch(count_kernel, grid, (labels, counts), (length, clusters), **constants, num_warps=4)
    launch(
        place_kernel,
        grid,
        (labels, counts, perm, narrow, offsets, sizes),
        (length, clusters, text[0], words, text_block),
        **constants,
        **_SORTING,
    )
    # what others would make of it; an alias, since what is remembered of a tensor must not keep it
    remembered(perm, offsets, "compact", lambda: Compact(narrow, offsets.detach()))
    remembered(perm, offsets, "sizes", lambda: sizes)
    return perm, offsets


_SORTING = {"SORTED": _SORTED, "SHIFT": _SORTED.bit_length() - 1, "num_warps": 4}


def _specimens(bins: int) -> list[Specimen]:
    constants = {"PART": _PART, "BINS": bins}
    types = dict.fromkeys(("label", "counts", "narrow", "bounds", "sizes"), "*i32")
    types["perm"] = "*i64"
    sorting = {name: value for name, value in _SORTING.items() if name != "num_warps"}
    found = ((count_kernel, constants), (place_kernel, {**constants, **sorting}))
    return [
        Specimen(
            f"{kernel.__name__} of {bins}",
            kernel,
            typed(kernel, given, **types),
            given,
            {"num_warps": 4},
        )
        for kernel, given in found
    ]


SPECIMENS = (
    [*_specimens(512), *_specimens(2048)] if isinstance(count_kernel, triton.JITFunction) else []
)
