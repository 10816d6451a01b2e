"""Token attention on Hopper, in Gluon: tiles of alike tokens, each through the union of its blocks.

Groups of up to 16 blocks are taken at once (`lists`). An item of work is 128 tokens of a group that
chose alike, and the boxes of keys that any of them chose; in a box that not all of them chose, each
token counts its own. As many programs as there are processors take the items in turn: one warp
brings keys and values, two warp groups take 64 queries each, as in block attention. An item leaves
one partial for every token, and the partials of a token's groups are merged at the end.
"""

from itertools import accumulate

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from dit_accel.kernels.backends import multiprocessors
from dit_accel.kernels.block_attention.hopper import shared_layout
from dit_accel.kernels.block_attention.softmax import _soften, _soften_plain
from dit_accel.kernels.gather import gather_both
from dit_accel.kernels.gluon_names import before_hand_over, load_box
from dit_accel.kernels.launch import launch
from dit_accel.kernels.packed import START_BIT, compact
from dit_accel.kernels.specimen import Specimen
from dit_accel.kernels.token_attention.dealing import MOST_PROGRAMS, deal
from dit_accel.kernels.token_attention.dealing import specimens as of_dealing
from dit_accel.kernels.token_attention.lists import (
    ENTRY_BITS,
    ITEM,
    ROWS,
    boxes_of,
    bytes_of,
    lists,
    specimens,
)
from dit_accel.kernels.token_attention.runs import room_for
from dit_accel.kernels.words import Words, grouping

KEPT_BYTES: int | None = None
"""What is kept at once; if none, as much as queries, keys and values take, results included."""
_LEAST = 2**26
"""What may be kept in any case."""
_KEPT = 256
"""Keys that are on their way or in use."""
_ITEM = gl.constexpr(ITEM)
_ENTRY = gl.constexpr(ENTRY_BITS)
_START = gl.constexpr(START_BIT)
# renamed between Triton 3.6 and 3.9
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _bring(desc, entries, row, buffer, ready, BOX: gl.constexpr):
    """The boxes of one turn of a list into one buffer."""
    width: gl.constexpr = buffer.shape[0]
    depth: gl.constexpr = buffer.shape[1]
    mbarrier.expect(ready, width * depth * 2)
    for i in gl.static_range(width // BOX):
        load_box(desc, [row + (entries[i] >> _START), 0], ready, buffer.slice(i * BOX, BOX))


@gluon.jit
def _listed(p, number):
    """Of an item: its boxes, where their list is, and how many of them all chose."""
    there = number >= 0
    item = p.items + number * _ITEM
    plain = gl.load(item + 3, mask=there, other=0)
    count = gl.load(item + 4, mask=there, other=0)
    return count, gl.load(item + 5, mask=there, other=0), plain


@gluon.jit
def _after(p, number):
    """The item that this program computes after one, or -1."""
    return gl.load(p.following + number, mask=number >= 0, other=-1)


@gluon.jit
def _producer(p, BOX: gl.constexpr):
    stages: gl.constexpr = p.k_bufs.shape[0]
    boxes: gl.constexpr = p.k_bufs.shape[1] // BOX
    turn = gl.to_tensor(0)
    number = p.begin
    while number >= 0:
        item = p.items + number * _ITEM
        number = _after(p, number)
        row = (gl.load(item + 6) * p.heads + gl.load(item + 7) - p.held_pair) * p.length
        turns = (gl.load(item + 4) + boxes - 1) // boxes
        entries = p.listed + gl.load(item + 5)
        for i in range(turns):
            here = _entries_of(entries, i, boxes)
            at = turn % stages
            free = ((turn // stages) & 1) ^ 1
            mbarrier.wait(p.k_free.index(at), free)
            _bring(p.keys, here, row, p.k_bufs.index(at), p.k_ready.index(at), BOX)
            mbarrier.wait(p.v_free.index(at), free)
            _bring(p.values, here, row, p.v_bufs.index(at), p.v_ready.index(at), BOX)
            turn += 1


@gluon.jit
def _entries_of(entries, turn, boxes: gl.constexpr):
    """The boxes of one turn."""
    found = (gl.load(entries + turn * boxes),)
    for i in gl.static_range(1, boxes):
        found = found + (gl.load(entries + turn * boxes + i),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@gluon.jit
def _chosen(s, by, word, entries, columns, BOX: gl.constexpr):
    """Logits in powers of two; minus infinity where a token did not choose, and beyond a box."""
    boxes: gl.constexpr = s.shape[1] // BOX
    box = gl.expand_dims(columns // BOX, 0)
    bias = gl.full_like(s, float("-inf"))
    limit = gl.full_like(columns, 0)
    for i in gl.static_range(boxes):
        taken = ((word >> ((entries[i] >> _ENTRY) & 15)) & 1) != 0
        mine = gl.expand_dims(gl.where(taken, 0.0, float("-inf")), 1)
        bias = gl.where(box == i, mine, bias)
        limit = gl.where(columns // BOX == i, entries[i] & ((1 << _ENTRY) - 1), limit)
    known = columns % BOX < limit
    return gl.where(gl.expand_dims(known, 0), s * by + bias, float("-inf"))


@gluon.jit
def _are_full(entries, boxes: gl.constexpr, BOX: gl.constexpr):
    """Whether all boxes of a turn are of full length."""
    full = (entries[0] & ((1 << _ENTRY) - 1)) == BOX
    for i in gl.static_range(1, boxes):
        full = full & ((entries[i] & ((1 << _ENTRY) - 1)) == BOX)
    return full


@gluon.jit
def _chosen_full(s, by, word, entries, columns, BOX: gl.constexpr):
    """As `_chosen`, where all boxes are of full length."""
    boxes: gl.constexpr = s.shape[1] // BOX
    box = gl.expand_dims(columns // BOX, 0)
    bias = gl.full_like(s, float("-inf"))
    for i in gl.static_range(boxes):
        taken = ((word >> ((entries[i] >> _ENTRY) & 15)) & 1) != 0
        bias = gl.where(box == i, gl.expand_dims(gl.where(taken, 0.0, float("-inf")), 1), bias)
    return s * by + bias


@gluon.jit
def _header(p, number, group: gl.constexpr):
    """Of an item: its element and head, where this group's tokens begin, and how many there are."""
    there = number >= 0
    item = p.items + number * _ITEM
    unit = gl.load(item, mask=there, other=0)
    tile = gl.load(item + 1, mask=there, other=0)
    count = gl.load(item + 2, mask=there, other=0) - group * 64
    b = gl.load(item + 6, mask=there, other=0)
    h = gl.load(item + 7, mask=there, other=0)
    return b, h, unit.to(gl.int64) * p.padded + tile * 128 + group * 64, count


@gluon.jit
def _fetch(p, b, h, token, column, buffer):
    """Begin to gather the queries of some tokens."""
    queries = p.q + b.to(gl.int64) * p.q_b + h.to(gl.int64) * p.q_h
    where = gl.expand_dims(token * p.q_l, 1) + gl.expand_dims(column, 0)
    _copy(buffer, queries + where)
    async_copy.commit_group()


@gluon.jit
def _consumer(p, group: gl.constexpr, q_bufs, BOX: gl.constexpr):
    depth: gl.constexpr = q_bufs.shape[2]
    stages: gl.constexpr = p.k_bufs.shape[0]
    width: gl.constexpr = p.k_bufs.shape[1]
    boxes: gl.constexpr = width // BOX
    dtype: gl.constexpr = q_bufs.dtype
    rows: gl.constexpr = 64
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // depth, depth // 8], [4, 1], [1, 0])
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, depth, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    row_of: gl.constexpr = gl.SliceLayout(1, logits)
    acc_row: gl.constexpr = gl.SliceLayout(1, result)
    nothing = gl.zeros([rows, width], gl.float32, logits)
    columns = gl.arange(0, width, gl.SliceLayout(0, logits))
    column = gl.arange(0, depth, gl.SliceLayout(0, flat))
    place = gl.arange(0, rows, gl.SliceLayout(1, flat))
    row = gl.arange(0, rows, row_of)

    # queries are gathered an item ahead, and their tokens known an item before that
    number = p.begin
    ahead = _after(p, number)
    beyond = _after(p, ahead)
    b, h, start, count = _header(p, number, group)
    token = gl.load(p.tokens + start + place, mask=place < count, other=0)
    _fetch(p, b, h, token, column, q_bufs.index(0))
    next_word = gl.load(p.words + start + row, mask=row < count, other=0)
    b, h, start, count = _header(p, ahead, group)
    token = gl.load(p.tokens + start + place, mask=place < count, other=0)
    listed, at_list, everyone = _listed(p, number)
    turn = gl.to_tensor(0)
    q_at = gl.to_tensor(0)
    while number >= 0:
        item = p.items + number * _ITEM
        plain = everyone // boxes
        turns = (listed + boxes - 1) // boxes
        entries = p.listed + at_list
        listed, at_list, everyone = _listed(p, ahead)
        word = next_word.to(gl.int32)
        q_buf = q_bufs.index(q_at)
        q_next = gl.where(q_at == 2, 0, q_at + 1)
        async_copy.wait_group(0)
        fence_async_shared()
        # of the three buffers the one whose partial was stored two items ago
        tma.store_wait(pendings=1)
        _fetch(p, b, h, token, column, q_bufs.index(q_next))
        next_word = gl.load(p.words + start + row, mask=row < count, other=0)
        b, h, start, count = _header(p, beyond, group)
        kept = (number - p.first_item) * (2 * rows) + group * rows
        number = ahead
        ahead = beyond
        beyond = _after(p, beyond)

        acc = gl.zeros([rows, depth], gl.float32, result)
        m = gl.full([rows], float("-inf"), gl.float32, row_of)
        mass = gl.zeros([rows], gl.float32, row_of)
        if turns > 0:
            found = _entries_of(entries, gl.to_tensor(0), boxes)
            at = turn % stages
            mbarrier.wait(p.k_ready.index(at), (turn // stages) & 1)
            s = warpgroup_mma(q_buf, p.k_bufs.index(at).permute((1, 0)), nothing, use_acc=False)
            mbarrier.arrive(p.k_free.index(at), count=1)
            if plain == 0:
                if _are_full(found, boxes, BOX):
                    s = _chosen_full(s, p.by, word, found, columns, BOX)
                else:
                    s = _chosen(s, p.by, word, found, columns, BOX)
                weights, m, mass, fade = _soften(s, m, mass)
            else:
                weights, m, mass, fade = _soften_plain(s, m, mass, p.by)
            a = gl.convert_layout(weights.to(dtype), operand)
            # where they are is known by now, and there is time until they are wanted
            token = gl.load(p.tokens + start + place, mask=place < count, other=0)
            for i in range(1, turns):
                found = _entries_of(entries, i, boxes)
                v_at = turn % stages
                v_phase = (turn // stages) & 1
                turn += 1
                at = turn % stages
                mbarrier.wait(p.k_ready.index(at), (turn // stages) & 1)
                keys = p.k_bufs.index(at).permute((1, 0))
                s_next = warpgroup_mma(q_buf, keys, nothing, use_acc=False, is_async=True)
                mbarrier.wait(p.v_ready.index(v_at), v_phase)
                acc_next = warpgroup_mma(a, p.v_bufs.index(v_at), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s_next,))
                mbarrier.arrive(p.k_free.index(at), count=1)
                if i >= plain:
                    if _are_full(found, boxes, BOX):
                        s = _chosen_full(s, p.by, word, found, columns, BOX)
                    else:
                        s = _chosen(s, p.by, word, found, columns, BOX)
                    weights, m, mass, fade = _soften(s, m, mass)
                else:
                    weights, m, mass, fade = _soften_plain(s, m, mass, p.by)
                acc, a = warpgroup_mma_wait(0, deps=(acc_next, a))
                mbarrier.arrive(p.v_free.index(v_at), count=1)
                acc = acc * gl.expand_dims(gl.convert_layout(fade, acc_row), 1)
                a = gl.convert_layout(weights.to(dtype), operand)
            v_at = turn % stages
            mbarrier.wait(p.v_ready.index(v_at), (turn // stages) & 1)
            acc = warpgroup_mma(a, p.v_bufs.index(v_at), acc)
            mbarrier.arrive(p.v_free.index(v_at), count=1)
            turn += 1
        else:
            token = gl.load(p.tokens + start + place, mask=place < count, other=0)

        total = gl.where(mass == 0.0, 1.0, mass)
        acc = acc * gl.expand_dims(gl.convert_layout(1.0 / total, acc_row), 1)
        left = gl.load(item + 2) - group * rows
        q_buf.store(acc.to(dtype))
        fence_async_shared()
        _store(p.parts, [kept, 0], q_buf)
        norm = gl.where(mass == 0.0, float("-inf"), m + gl.log2(total))
        gl.store(p.lse + kept + row, norm, mask=row < left)
        q_at = q_next
    async_copy.wait_group(0)
    tma.store_wait(pendings=0)


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
            (_consumer, (shares, 0, q_bufs, BOX)),
            (_consumer, (shares, 1, more_q_bufs, BOX)),
            (_producer, (shares, BOX)),
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
    _specimen("bf16", 128, 128, 64),
    _specimen("bf16", 128, 64, 32),
    _specimen("fp16", 64, 64, 16),
]
