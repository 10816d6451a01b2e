"""Token attention in Triton: key blocks fetch the queries that chose them.

By key block, every pair that is computed was selected, whatever the selection looks like; by query
tile, a tile computes the union of what its tokens selected, which in the worst case is everything.
The price is a partial for every choice, written and read once: ``4 D`` bytes beside ``4 D n``
operations for a block of ``n`` keys. On a card of 4 TB/s and 500 TFLOP/s that is as dear as the
attention itself at 125 keys a block and a sixth of it at 750. So blocks that are small are taken
by the group, two or four at once. The tokens of a group are sorted by which of its blocks
they chose, in the order of a Gray code; then nearly all tiles hold tokens of one choice, a tile
goes through the blocks of that, and leaves one partial for the whole group. Where two choices meet
in a tile, it goes through the blocks of both, and each token counts its own.

Some heads and groups at a time, so that what is kept in between is bounded whatever is selected.
The host reads nothing: lists have room for every token, and tiles that find none end at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel.kernels.backends import HEAD_SIZES, is_hopper
from dit_accel.kernels.gather import gather_rows
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import MOST_ROWS, compact
from dit_accel.kernels.specimen import Specimen, typed
from dit_accel.kernels.token_attention.merging import State, merge_parts
from dit_accel.kernels.token_attention.merging import specimens as of_merging
from dit_accel.kernels.token_attention.sorting import pack
from dit_accel.kernels.tuning import SPACES
from dit_accel.kernels.tuning import setting as tuned
from dit_accel.kernels.word_bits import word_bit
from dit_accel.kernels.words import Words, grouping

LOG2E = tl.constexpr(1.4426950408889634)
KEPT_BYTES = 2**30
"""What partials and lists may take."""
_TILE = 512
"""Tokens that are sorted by one program."""


def group_size(length: int, blocks: int) -> int:
    """How many blocks are taken at once: 1 for blocks of 512 tokens or more, at most 4."""
    return next((n for n in (1, 2) if n * length >= 512 * blocks), 4)


@triton.jit(
    do_not_specialize=[
        *("heads", "length", "groups", "blocks", "first_pair", "first_group", "size"),
        *("word_b", "word_h"),
    ]
)
def _choices(
    word_ptr,
    choice_ptr,
    word_b,
    word_h,
    size,
    heads,
    length,
    groups,
    blocks,
    first_pair,
    first_group,
    G: tl.constexpr,
    BT: tl.constexpr,
):
    """For every group of ``G`` and token a byte: which of the group's blocks the token chose."""
    pair, group = tl.program_id(2).to(tl.int64), tl.program_id(1)
    b, h = (first_pair + pair) // heads, (first_pair + pair) % heads
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = token < length
    word_ptr += b * word_b + h * word_h + token
    byte = tl.zeros([BT], tl.int32)
    for i in tl.static_range(G):
        column = (first_group + group) * G + i
        here = inside & (tl.full([BT], column, tl.int32) < blocks)
        word = tl.load(word_ptr + (column // size).to(tl.int64) * length, mask=here, other=0)
        byte |= ((word.to(tl.int32) >> word_bit(column % size)) & 1) << i
    tl.store(choice_ptr + (pair * groups + group) * length + token, byte.to(tl.uint8), mask=inside)


@triton.jit
def _coded(choice_ptr, unit, length, BINS: tl.constexpr, BT: tl.constexpr):
    """A tile of tokens: where each choice stands in the Gray code, as a row of zeros and a one."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = token < length
    choice = tl.load(choice_ptr + unit * length + token, mask=inside, other=0).to(tl.int32)
    code = choice ^ (choice >> 1)
    code = code ^ (code >> 2)
    # the first bin would be those that chose nothing, and is left empty
    bins = tl.arange(0, BINS)
    one = ((code[:, None] == bins[None, :]) & (bins > 0)[None, :]).to(tl.int32)
    return token, inside, code > 0, bins, one


@triton.jit(do_not_specialize=["length"])
def _count(choice_ptr, count_ptr, length, BINS: tl.constexpr, BT: tl.constexpr):
    unit = tl.program_id(1).to(tl.int64)
    _, _, _, bins, one = _coded(choice_ptr, unit, length, BINS, BT)
    where = (unit * BINS + bins) * tl.num_programs(0) + tl.program_id(0)
    tl.store(count_ptr + where, tl.sum(one, 0))


@triton.jit(do_not_specialize=["length"])
def _place(choice_ptr, count_ptr, end_ptr, list_ptr, place_ptr, length, BINS: tl.constexpr,
           BT: tl.constexpr):  # fmt: skip
    unit = tl.program_id(1).to(tl.int64)
    token, inside, some, bins, one = _coded(choice_ptr, unit, length, BINS, BT)
    where = (unit * BINS + bins) * tl.num_programs(0) + tl.program_id(0)
    start = tl.load(end_ptr + where) - tl.load(count_ptr + where)
    place = tl.sum(one * (tl.cumsum(one, 0) - 1 + start[None, :]), 1)
    tl.store(list_ptr + unit * length + place, token, mask=some)
    tl.store(place_ptr + unit * length + token, tl.where(some, place, -1), mask=inside)


@triton.jit
def _step(query, acc, peak, total, chosen, keys, values, base, first, stop, scale,
          BN: tl.constexpr, RAGGED: tl.constexpr, ALL: tl.constexpr):  # fmt: skip
    """The online softmax over ``BN`` keys; tokens that did not choose them stay as they are."""
    key = keys.load([base + first, 0])
    value = values.load([base + first, 0])
    logit = tl.dot(query, key.T, input_precision="ieee")
    if RAGGED:
        place = first + tl.arange(0, BN)
        logit = tl.where((place < stop)[None, :], logit, float("-inf"))
    new = tl.maximum(peak, tl.max(logit, 1) * scale)
    if ALL:
        fade = tl.exp2(peak - new)
        weight = tl.exp2(logit * scale - new[:, None])
    else:
        new = tl.where(chosen, new, peak)
        fade = tl.where(chosen, tl.exp2(peak - new), 1.0)
        # the exponential of minus infinity is 0, so no weight has to be masked
        weight = tl.exp2(logit * scale - tl.where(chosen, new, float("inf"))[:, None])
    total = total * fade + tl.sum(weight, 1)
    acc = acc * fade[:, None]
    acc = tl.dot(weight.to(value.dtype), value, acc, input_precision="ieee")
    return acc, new, total


@triton.jit(do_not_specialize=["heads", "length", "groups", "blocks", "first_pair", "first_group"])
def _attend(
    q_ptr,
    keys,
    values,
    bound_ptr,
    choice_ptr,
    list_ptr,
    end_ptr,
    out_ptr,
    lse_ptr,
    q_b,
    q_h,
    q_l,
    bound_b,
    bound_h,
    scale,
    ends,
    heads,
    length,
    groups,
    blocks,
    first_pair,
    first_group,
    D: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    unit = tl.program_id(1).to(tl.int64)
    count = tl.load(end_ptr + unit * ends + ends - 1)
    if tl.program_id(0) * BM >= count:
        return
    pair, group = unit // groups, unit % groups
    b, h = (first_pair + pair) // heads, (first_pair + pair) % heads
    place = tl.program_id(0) * BM + tl.arange(0, BM)
    there = place < count
    token = tl.load(list_ptr + unit * length + place, mask=there, other=0)
    choice = tl.load(choice_ptr + unit * length + token, mask=there, other=0).to(tl.int32)
    depth = tl.arange(0, D)
    q_ptr += b * q_b + h * q_h
    query = tl.load(
        q_ptr + token.to(tl.int64)[:, None] * q_l + depth[None, :], mask=there[:, None], other=0.0
    )
    base = (pair * length).to(tl.int32)
    bound_ptr += b * bound_b + h * bound_h
    scale = scale * LOG2E
    acc = tl.zeros([BM, D], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    block = ((first_group + group) * G).to(tl.int32)
    for i in range(0, G):
        chosen = ((choice >> i) & 1) != 0
        start, stop = 0, 0
        if tl.max(chosen.to(tl.int32), 0) > 0:
            start = tl.load(bound_ptr + block + i).to(tl.int32)
            stop = tl.load(bound_ptr + block + i + 1).to(tl.int32)
        whole = start + (stop - start) // BN * BN
        for first in range(start, whole, BN):
            acc, peak, total = _step(
                query, acc, peak, total, chosen, keys, values, base, first, stop, scale,
                BN, False, G == 1,
            )  # fmt: skip
        if whole < stop:
            acc, peak, total = _step(
                query, acc, peak, total, chosen, keys, values, base, whole, stop, scale,
                BN, True, G == 1,
            )  # fmt: skip
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    where = unit * length + place
    tl.store(
        out_ptr + where[:, None] * D + depth[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=there[:, None],
    )
    tl.store(lse_ptr + where, peak + tl.log2(total), mask=there)


def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor | Words,
    k_perm: Tensor,
    k_offsets: Tensor,
    key_valid: Tensor | None,
    scale: float,
    rest: None,
    setting: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, depth = q.shape
    blocks = select.shape[3]
    device = q.device
    if q.numel() == 0:
        return q.new_empty(q.shape), torch.empty(q.shape[:3], dtype=torch.float32, device=device)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    words = select if isinstance(select, Words) else pack(select)
    if setting is None and _takes_hopper(q, scale):
        from dit_accel.kernels.token_attention import hopper

        return hopper.token_attention(q, k, v, words, k_perm, k_offsets, key_valid, scale)
    out = torch.empty(batch, heads, length, depth, dtype=q.dtype, device=device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=device)
    tokens, bounds = compact(k_perm, k_offsets, key_valid)

    size = (setting or {}).get("G") or group_size(length, blocks)
    bins, tiles = 2**size, triton.cdiv(length, _TILE)
    every = triton.cdiv(blocks, size)
    units = max(1, KEPT_BYTES // (length * (depth * q.itemsize + 13) + 8 * bins * tiles))
    groups = min(every, units)
    pairs = min(batch * heads, max(1, units // every))

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    keys, values = (room(pairs, length, depth, dtype=x.dtype) for x in (k, v))
    options = {**tuned("token_attention", q, length).values, **(setting or {})}
    options.pop("G", None)
    block_m, block_n = options.pop("BM"), options.pop("BN")
    described = [
        TensorDescriptor.from_tensor(x.view(-1, depth), [block_n, depth]) for x in (keys, values)
    ]
    part = room(pairs * groups, length, depth, dtype=q.dtype)
    part_lse = room(pairs * groups, length, dtype=torch.float32)
    choice = room(pairs * groups, length, dtype=torch.uint8)
    listed, place = room(pairs * groups, length), room(pairs * groups, length)
    state = State.of(pairs, length, depth, device) if groups < every else None

    for first_pair in range(0, batch * heads, pairs):
        some = min(pairs, batch * heads - first_pair)
        for x, buffer in ((k, keys), (v, values)):
            gather_rows(x, tokens, buffer, first_pair, some)
        for first_group in range(0, every, groups):
            these = min(groups, every - first_group)
            where = (heads, length, these, blocks, first_pair, first_group)
            _choices[(triton.cdiv(length, 1024), these, some)](
                words.word,
                choice,
                *lead_strides(words.word),
                grouping(blocks)[1],
                *where,
                G=size,
                BT=1024,
                num_warps=4,
            )
            count = room(some * these, bins * tiles)
            _count[(tiles, some * these)](choice, count, length, BINS=bins, BT=_TILE, num_warps=4)
            end = count.cumsum(-1, dtype=torch.int32)
            _place[(tiles, some * these)](
                choice, count, end, listed, place, length, BINS=bins, BT=_TILE, num_warps=4
            )
            _attend[(triton.cdiv(length, block_m), some * these)](
                q,
                *described,
                bounds,
                choice,
                listed,
                end,
                part,
                part_lse,
                *q.stride()[:3],
                *lead_strides(bounds),
                scale,
                bins * tiles,
                *where,
                D=depth,
                G=size,
                BM=block_m,
                BN=block_n,
                **options,
            )
            merge_parts(
                part,
                part_lse,
                place,
                state,
                out,
                lse,
                these,
                first_pair,
                some,
                first=first_group == 0,
                last=first_group + these == every,
            )
    return out, lse


def _takes_hopper(q: Tensor, scale: float) -> bool:
    fits = q.dtype.itemsize == 2 and q.shape[3] in HEAD_SIZES and q.shape[2] < MOST_ROWS
    return fits and scale > 0 and is_hopper(q.device)


def _specimens(depth: int, dtype: str, size: int) -> list[Specimen]:
    data, word, real = f"*{dtype}", "*i32", "*fp32"
    types = {
        **dict.fromkeys(("q_ptr", "out_ptr"), data),
        **dict.fromkeys(("keys", "values"), f"tensordesc<{dtype}[64, {depth}]>"),
        **dict.fromkeys(("bound_ptr", "count_ptr", "end_ptr", "list_ptr", "place_ptr"), word),
        "lse_ptr": real,
        "word_ptr": "*i16",
        "choice_ptr": "*u8",
        "scale": "fp32",
    }
    bins = {"BINS": 2**size, "BT": _TILE}
    chosen = SPACES["token_attention"].half
    launches: list[tuple[Any, dict[str, Any], int]] = [
        (_choices, {"G": size, "BT": 1024}, 4),
        (_count, bins, 4),
        (_place, bins, 4),
        (_attend, {"D": depth, "G": size, **chosen.constants}, 8),
    ]
    return [
        Specimen(
            f"{kernel.__name__} {dtype} D={depth} G={size}",
            kernel,
            typed(kernel, constants, **types),
            constants,
            chosen.options if kernel is _attend else {"num_warps": warps, "num_stages": 3},
            aligned=("q_b", "q_h", "q_l"),
        )
        for kernel, constants, warps in launches
    ] + of_merging(depth, dtype)


SPECIMENS = [*_specimens(64, "fp16", 4), *_specimens(128, "bf16", 1)]
