"""Token attention on Hopper, in Gluon: what the groups of warps do.

One warp brings keys and values, two warp groups take 64 queries each, as in block attention. A list
tells them which items are theirs, one after another.
"""

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

from dit_accel.kernels.block_attention.softmax import _soften, _soften_plain
from dit_accel.kernels.gluon_names import load_box
from dit_accel.kernels.packed import START_BIT
from dit_accel.kernels.token_attention.lists import ENTRY_BITS, ITEM

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
def producer(p, BOX: gl.constexpr):
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
def consumer(p, group: gl.constexpr, q_bufs, BOX: gl.constexpr):
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
