"""Token attention on Hopper, in Gluon: tiles of alike tokens, each through the union of its blocks.

Groups of up to 16 blocks are taken at once (`lists`). An item of work is 128 tokens of a group that
chose alike, and the boxes of keys that any of them chose; in a box that not all of them chose, each
token counts its own. As many programs as there are processors compute the items that were dealt to
them (`dealing`); what their warps do is in `warps.py`. An item leaves one partial for every token,
and the partials of a token's groups are merged at the end.
"""

from itertools import accumulate

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from dit_accel.kernels.backends import multiprocessors
from dit_accel.kernels.block_attention.hopper import shared_layout
from dit_accel.kernels.gather import gather_both
from dit_accel.kernels.gather import specimen as of_gather
from dit_accel.kernels.gluon_names import before_hand_over
from dit_accel.kernels.launch import launch
from dit_accel.kernels.packed import compact
from dit_accel.kernels.specimen import Specimen
from dit_accel.kernels.token_attention.dealing import MOST_PROGRAMS, deal
from dit_accel.kernels.token_attention.dealing import specimens as of_dealing
from dit_accel.kernels.token_attention.lists import (
    ROWS,
    boxes_of,
    bytes_of,
    lists,
    specimens,
)
from dit_accel.kernels.token_attention.runs import room_for
from dit_accel.kernels.token_attention.warps import consumer, producer
from dit_accel.kernels.words import Words, grouping

KEPT_BYTES: int | None = None
"""What is kept at once; if none, as much as queries, keys and values take, results included."""
_LEAST = 2**26
"""What may be kept in any case."""
_KEPT = 256
"""Keys that are on their way or in use."""


class _Parts:
    """What the three groups of warps share."""

    q: gl.tensor
    tokens: gl.tensor
    words: gl.tensor
    items: gl.tensor
    listed: gl.tensor
    lse: gl.tensor
    q_b: gl.tensor
    q_h: gl.tensor
    q_l: gl.tensor
    heads: gl.tensor
    length: gl.tensor
    padded: gl.tensor
    held_pair: gl.tensor
    first_item: gl.tensor
    begin: gl.tensor
    following: gl.tensor
    by: gl.tensor
    keys: tma.tensor_descriptor
    values: tma.tensor_descriptor
    parts: tma.tensor_descriptor
    k_bufs: gl.shared_memory_descriptor
    v_bufs: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_ready: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, *values):
        for name, value in zip(_FIELDS, values, strict=True):
            setattr(self, name, value)


_FIELDS = tuple(_Parts.__annotations__)
_Parts = aggregate(_Parts)  # type: ignore[misc]


@gluon.jit(
    do_not_specialize=[
        *("heads", "length", "padded", "groups", "first_pair", "held_pair", "dealt", "run"),
        "capacity",
    ]
)
def attend_kernel(
    q,
    keys,
    values,
    parts,
    part_lse,
    tokens,
    words,
    first,
    items,
    listed,
    following,
    start,
    q_b,
    q_h,
    q_l,
    heads,
    length,
    padded,
    groups,
    first_pair,
    held_pair,
    dealt,
    run,
    capacity,
    scale,
    BOX: gl.constexpr,
    PER: gl.constexpr,
    STAGES: gl.constexpr,
    D: gl.constexpr,
):
    dtype: gl.constexpr = keys.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    signal: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(dtype, [3, 64, D], shared)
    more_q_bufs = gl.allocate_shared_memory(dtype, [3, 64, D], shared)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, PER, D], shared)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, PER, D], shared)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signal)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signal)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signal)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signal)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
    first_item = gl.load(first + held_pair * groups) + run * capacity
    shares = _Parts(
        q,
        tokens,
        words,
        items,
        listed,
        part_lse,
        gl.to_tensor(q_b).to(gl.int64),
        gl.to_tensor(q_h).to(gl.int64),
        gl.to_tensor(q_l),
        heads,
        length,
        padded,
        first_pair + held_pair,
        first_item,
        gl.load(start + dealt * gl.num_programs(0) + gl.program_id(0)),
        following,
        scale * 1.4426950408889634,
        keys,
        values,
        parts,
        k_bufs,
        v_bufs,
        k_ready,
        k_free,
        v_ready,
        v_free,
    )
    before_hand_over()
    gl.warp_specialize(
        [
            (consumer, (shares, 0, q_bufs, BOX)),
            (consumer, (shares, 1, more_q_bufs, BOX)),
            (producer, (shares, BOX)),
        ],
        [4, 1],
        [240, 24],
    )


def setting_of(length: int, blocks: int) -> tuple[int, int]:
    """Keys of a turn and of a box: long runs for long blocks, else what small ones fill."""
    if length >= 128 * blocks:
        return 128, 64
    return 64, 32 if length >= 64 * blocks else 16


def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Words,
    k_perm: Tensor,
    k_offsets: Tensor,
    key_valid: Tensor | None,
    scale: float,
    setting: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `triton.token_attention`, in fp16 or bf16, head size 64 or 128, a positive scale."""
    from dit_accel.kernels.token_attention.merging import State, merge_items

    q = q if _aligned(q) else q.contiguous().clone()
    batch, heads, length, depth = q.shape
    blocks, every, device = words.blocks, batch * heads, q.device
    out = torch.empty(batch, heads, length, depth, dtype=q.dtype, device=device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=device)
    order = compact(k_perm, k_offsets, key_valid)
    turn, box = setting or setting_of(length, blocks)
    groups, size = grouping(blocks)
    found = boxes_of(order, length, size, box)
    padded = triton.cdiv(length, ROWS) * ROWS
    most = groups * triton.cdiv(length, ROWS)
    fits = room_for(
        every,
        most,
        KEPT_BYTES or max(_LEAST, 2 * out.nbytes - lse.nbytes - words.word.nbytes),
        listed=bytes_of(length, blocks, box),
        ordered=2 * length * depth * q.itemsize,
        parted=ROWS * (depth * q.itemsize + 4),
        state=length * (4 * depth + 8),
    )

    sizes = [
        *[fits.heads * length * depth * q.itemsize] * 2,
        fits.items * ROWS * depth * q.itemsize,
        fits.items * ROWS * 4,
        length * depth * 4 if fits.runs > 1 else 0,
        *[length * 4 if fits.runs > 1 else 0] * 2,
    ]
    # one piece of memory, whole while tokens are sorted
    places = list(accumulate((-(-size // 1024) * 1024 for size in sizes), initial=0))
    scratch = torch.empty(places[-1], dtype=torch.uint8, device=device)
    keys, values, part, part_lse, *running = (
        scratch[at : at + size].view(dtype)
        for at, size, dtype in zip(
            places, sizes, (*[q.dtype] * 3, *[torch.float32] * 4), strict=False
        )
    )
    keys, values = (x.view(fits.heads, length, depth) for x in (keys, values))
    state = State(*running) if fits.runs > 1 else None
    described = [
        TensorDescriptor.from_tensor(x.view(-1, depth), [rows, depth], shared_layout())
        for x, rows in ((keys, box), (values, box), (part, 64))
    ]
    programs = _processors(device)
    for first_pair in range(0, every, fits.pairs):
        some = min(fits.pairs, every - first_pair)
        made = lists(words, found, heads, first_pair, some, box, scratch)
        dealt = deal(
            made.item, made.first, groups, some, fits.heads, fits.runs, fits.items, programs, box
        )
        for together, pair in enumerate(range(0, some, fits.heads)):
            these = min(fits.heads, some - pair)
            gather_both(k, v, order.perm, keys, values, first_pair=first_pair + pair, pairs=these)
            for run in range(fits.runs):
                launch(
                    attend_kernel,
                    (programs,),
                    (
                        q,
                        *described,
                        part_lse,
                        made.token,
                        made.word,
                        made.first,
                        made.item,
                        made.listed,
                        dealt.next,
                        dealt.start,
                    ),
                    (
                        *q.stride()[:3],
                        heads,
                        length,
                        padded,
                        groups,
                        first_pair,
                        pair,
                        together * fits.runs + run,
                        run,
                        fits.items,
                        scale,
                    ),
                    BOX=box,
                    PER=turn,
                    STAGES=_KEPT // turn,
                    D=depth,
                    **LAUNCH,
                )
                merge_items(
                    part, part_lse, made.place, made.first, state, out, lse,
                    groups, first_pair, pair, these, run,
                )  # fmt: skip
        del made, dealt  # before those of the next heads are there
    return out, lse


def _aligned(q: Tensor) -> bool:
    """Whether rows can be copied 16 bytes at a time, and 32 bits tell those of a head apart."""
    if q.shape[2] * q.stride(2) >= 1 << 31:
        return False
    return q.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in q.stride()[:3])


def _processors(device: torch.device) -> int:
    return min(multiprocessors(device), MOST_PROGRAMS)


def _specimen(dtype: str, depth: int, turn: int, box: int) -> Specimen:
    bits = {size: f"tensordesc<{dtype}[{size}, {depth}],{shared_layout()!r}>" for size in (box, 64)}
    signature = {
        "q": f"*{dtype}",
        **dict.fromkeys(("tokens", "first", "items", "listed", "following", "start"), "*i32"),
        "words": "*i16",
        "part_lse": "*fp32",
        **dict.fromkeys(("keys", "values"), bits[box]),
        "parts": bits[64],
        "scale": "fp32",
    }
    constants = {"BOX": box, "PER": turn, "STAGES": _KEPT // turn, "D": depth}
    names = attend_kernel.arg_names
    signature |= {n: "i32" for n in names if n not in signature and n not in constants}
    name = f"attend {dtype} D{depth} turn {turn} box {box}"
    return Specimen(
        name, attend_kernel, signature, constants, LAUNCH, 90, 90, ("q_b", "q_h", "q_l")
    )


LAUNCH = {"num_warps": 4, "maxnreg": 168}
SPECIMENS = [
    *specimens(),
    *of_dealing(),
    of_gather(128, "bf16", both=True, zero=False),
    _specimen("bf16", 128, 128, 64),
    _specimen("bf16", 128, 64, 32),
    _specimen("fp16", 64, 64, 16),
]
