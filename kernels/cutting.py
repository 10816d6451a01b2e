"""Blocks of any length cut into tiles by one kernel; `packed.tiles` takes many operations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.packed import BLOCK_BIT, START_BIT, Tiles
from dit_accel.kernels.specimen import Specimen, typed

_CHUNK = 256
"""Blocks that a program cuts."""
_BITS = tl.constexpr(START_BIT)
_BLOCK = tl.constexpr(BLOCK_BIT)


@triton.jit(do_not_specialize=["blocks", "most"])
def cut_kernel(
    offsets, block, span, first, blocks, most, SIZE: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offsets += head * (blocks + 1)
    first += head * (blocks + 1)
    block += head * most
    span += head * most
    lane = tl.arange(0, CHUNK)
    counted = tl.zeros([CHUNK], tl.int32)
    for other in range(0, part):
        start = tl.load(offsets + other * CHUNK + lane)
        stop = tl.load(offsets + other * CHUNK + lane + 1)
        counted += tl.cdiv(stop - start, SIZE)
    before = tl.sum(counted, 0)
    number = part * CHUNK + lane
    inside = number < blocks
    start = tl.load(offsets + number, mask=inside, other=0)
    count = tl.load(offsets + number + 1, mask=inside, other=0) - start
    pieces = tl.cdiv(count, SIZE)
    at = before + tl.cumsum(pieces, 0) - pieces
    tl.store(first + number, at, mask=inside)
    for i in range(0, tl.max(pieces, 0)):
        some = i < pieces
        tl.store(block + at + i, (number << _BLOCK) + 1, mask=some)
        length = tl.minimum(count - i * SIZE, SIZE)
        tl.store(span + at + i, ((start + i * SIZE) << _BITS) | length, mask=some)
    if part == tl.num_programs(0) - 1:
        total = before + tl.sum(pieces, 0)
        tl.store(first + blocks, total)
        nothing = tl.zeros([CHUNK], tl.int32)
        for place in range(total, most, CHUNK):
            tl.store(block + place + lane, nothing, mask=place + lane < most)
            tl.store(span + place + lane, nothing, mask=place + lane < most)


def cut_blocks(offsets: Tensor, length: int, size: int) -> tuple[Tiles, Tensor]:
    """Cut blocks every ``size`` tokens.

    Args:
        offsets: int32 ``[B|1, H|1, N + 1]``, contiguous.
        length: tokens in all.
        size: longest tile, below ``2 ** LENGTH_BITS``.

    Returns:
        The tiles, in the order of their blocks and at least one, and int32 ``[B|1, H|1, N + 1]``,
        where those of each block begin.
    """
    lead, blocks = offsets.shape[:2], offsets.shape[-1] - 1
    most = max(1, blocks + length // size)
    block, span = (
        torch.empty((*lead, most), dtype=torch.int32, device=offsets.device) for _ in range(2)
    )
    first = torch.empty(offsets.shape, dtype=torch.int32, device=offsets.device)
    launch(
        cut_kernel,
        (max(1, -(-blocks // _CHUNK)), lead[0] * lead[1]),
        (offsets, block, span, first),
        (blocks, most),
        SIZE=size,
        CHUNK=_CHUNK,
        num_warps=4,
    )
    return Tiles(block, span), first


def specimen() -> Specimen:
    """The kernel as it is launched."""
    constants = {"SIZE": 128, "CHUNK": _CHUNK}
    pointers = dict.fromkeys(("offsets", "block", "span", "first"), "*i32")
    signature = typed(cut_kernel, constants, **pointers)
    return Specimen("cut into tiles", cut_kernel, signature, constants, {"num_warps": 4})
