"""The sums of block importance on Hopper, in Gluon.

One warp brings keys by TMA, 128 a turn; three warp groups take 64 queries each. They drift apart by
themselves, so that while one's products run the others are at their exponentials.
"""

from functools import lru_cache
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from dit_accel.kernels.block_importance.samples import (
    CELL,
    NUMBERS,
    TURN,
    Probe,
    signature_of,
)
from dit_accel.kernels.gluon_names import before_hand_over, load_box
from dit_accel.kernels.launch import launch
from dit_accel.kernels.specimen import Specimen

_GROUPS = 3
_ROWS = 64
"""Queries of a warp group."""
_STAGES = 4


@gluon.jit
def _producer(p, keys, row):
    stages: gl.constexpr = p.k_bufs.shape[0]
    width: gl.constexpr = p.k_bufs.shape[1]
    depth: gl.constexpr = p.k_bufs.shape[2]
    for i in range(p.turns):
        at = i % stages
        mbarrier.wait(p.k_free.index(at), ((i // stages) & 1) ^ 1)
        mbarrier.expect(p.k_ready.index(at), width * depth * 2)
        load_box(keys, [row + i * width, 0], p.k_ready.index(at), p.k_bufs.index(at))


@gluon.jit
def _cells_of(weights):
    """Sums of the 8 cells of a turn, whose columns lie where one thread has them all."""
    rows: gl.constexpr = weights.shape[0]
    apart = gl.reshape(weights, [rows, 2, 8, 4, 2])
    halves = gl.sum(gl.sum(apart, 4), 2)
    return gl.reshape(gl.permute(halves, [0, 2, 1]), [rows, 8])


@gluon.jit
def _tell(p, s, turn, first, peak, total):
    """Write the sums of a turn's cells, and take them into those of the row."""
    rows: gl.constexpr = s.shape[0]
    row_of: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    base = gl.max(s, 1) * p.by
    # a turn of empty blocks has no key
    safe = gl.where(base == float("-inf"), 0.0, base)
    # two cells of a row are one thread's, which writes them as one word
    layout: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 8],
    )
    weights = gl.exp2(s * p.by - gl.expand_dims(safe, 1))
    cells = gl.convert_layout(_cells_of(weights), layout)
    line = first + gl.arange(0, rows, gl.SliceLayout(1, layout))
    target = (
        gl.multiple_of(p.sums, 16) + gl.expand_dims(line.to(gl.int64) * (p.width * 8), 1) + turn * 8
    )
    target += gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, layout)), 0)
    gl.store(target, cells.to(gl.float16), mask=gl.expand_dims(line < p.count, 1))
    own = first + gl.arange(0, rows, row_of)
    base_at = p.bases + turn.to(gl.int64) * p.samples + own
    gl.store(base_at, base, mask=own < p.count)
    new = gl.maximum(peak, base)
    level = gl.where(new == float("-inf"), 0.0, new)
    mass = gl.convert_layout(gl.sum(cells, 1), row_of)
    return new, total * gl.exp2(peak - level) + mass * gl.exp2(base - level)


@gluon.jit
def _consumer(p, group: gl.constexpr, q_buf):
    stages: gl.constexpr = p.k_bufs.shape[0]
    width: gl.constexpr = p.k_bufs.shape[1]
    rows: gl.constexpr = q_buf.shape[0]
    depth: gl.constexpr = q_buf.shape[1]
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // depth, depth // 8], [4, 1], [1, 0])
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    row_of: gl.constexpr = gl.SliceLayout(1, logits)
    # the queries of this group, gathered
    first = p.sample + group * rows
    place = first + gl.arange(0, rows, gl.SliceLayout(1, flat))
    inside = place < p.count
    token = gl.load(p.tokens + place, mask=inside, other=0)
    column = gl.arange(0, depth, gl.SliceLayout(0, flat))
    where = gl.expand_dims(token.to(gl.int64), 1) * p.q_l + gl.expand_dims(column, 0)
    q_buf.store(gl.load(p.q + where, mask=gl.expand_dims(inside, 1), other=0.0))
    fence_async_shared()

    nothing = gl.zeros([rows, width], gl.float32, logits)
    columns = gl.arange(0, width, gl.SliceLayout(0, logits))
    peak = gl.full([rows], float("-inf"), gl.float32, row_of)
    total = gl.zeros([rows], gl.float32, row_of)
    for i in range(p.turns):
        plain = gl.load(p.plain + i)
        at = i % stages
        mbarrier.wait(p.k_ready.index(at), (i // stages) & 1)
        keys = p.k_bufs.index(at).permute((1, 0))
        s = warpgroup_mma(q_buf, keys, nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(p.k_free.index(at), count=1)
        if plain == 0:
            full = gl.load(p.key_token + i * width + columns) >= 0
            s = gl.where(gl.expand_dims(full, 0), s, float("-inf"))
        peak, total = _tell(p, s, i, first, peak, total)
    own = first + gl.arange(0, rows, row_of)
    gl.store(p.lse + own, gl.log2(total) + peak, mask=own < p.count)


class _Parts:
    """What the groups of warps share."""

    q: gl.tensor
    q_l: gl.tensor
    tokens: gl.tensor
    count: gl.tensor
    sample: gl.tensor
    by: gl.tensor
    turns: gl.tensor
    width: gl.tensor
    samples: gl.tensor
    plain: gl.tensor
    key_token: gl.tensor
    sums: gl.tensor
    bases: gl.tensor
    lse: gl.tensor
    k_bufs: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, *values):
        for name, value in zip(_FIELDS, values, strict=True):
            setattr(self, name, value)


_FIELDS = tuple(_Parts.__annotations__)
_Parts = aggregate(_Parts)  # type: ignore[misc]


@gluon.jit(do_not_specialize=NUMBERS)
def sums_kernel(
    q,
    keys,
    q_token,
    q_bound,
    cell,
    key_token,
    plain,
    sums,
    bases,
    lse,
    q_b,
    q_h,
    q_l,
    token_b,
    token_h,
    bound_b,
    bound_h,
    cell_b,
    cell_h,
    turn_b,
    turn_h,
    scale,
    turns,
    samples,
    rows,
    columns,
    heads,
    first_pair,
    D: gl.constexpr,
    BN: gl.constexpr,
    W: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
):
    pair = gl.program_id(1)
    b = ((first_pair + pair) // heads).to(gl.int64)
    h = ((first_pair + pair) % heads).to(gl.int64)
    count = gl.load(q_bound + b * bound_b + h * bound_h + rows)
    used = (gl.load(cell + b * cell_b + h * cell_h + columns) * W + BN - 1) // BN
    sample = gl.program_id(0) * (GROUPS * ROWS)
    if (sample < count) & (used > 0):
        dtype: gl.constexpr = keys.dtype
        shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        signal: gl.constexpr = mbarrier.MBarrierLayout()
        q_bufs = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, D], shared)
        k_bufs = gl.allocate_shared_memory(dtype, [STAGES, BN, D], shared)
        k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signal)
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signal)
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_ready.index(stage), count=1)
            mbarrier.init(k_free.index(stage), count=GROUPS)
        at = pair.to(gl.int64) * samples
        parts = _Parts(
            q + b * q_b + h * q_h,
            gl.to_tensor(q_l),
            q_token + b * token_b + h * token_h,
            count,
            sample,
            scale * 1.4426950408889634,
            used,
            turns,
            samples,
            plain + b * turn_b + h * turn_h,
            key_token + (b * turn_b + h * turn_h) * BN,
            sums + at * turns * 8,
            bases + at * turns,
            lse + at,
            k_bufs,
            k_ready,
            k_free,
        )
        before_hand_over()
        gl.warp_specialize(
            [
                (_consumer, (parts, 0, q_bufs.index(0))),
                (_consumer, (parts, 1, q_bufs.index(1))),
                (_consumer, (parts, 2, q_bufs.index(2))),
                (_producer, (parts, keys, pair * turns * BN)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def sums(probe: Probe) -> None:
    """As `triton`'s, in fp16 or bf16, for head sizes 64 and 128 and positive scales."""
    depth, samples = probe.q.shape[-1], probe.tokens.shape[-1]
    rows = probe.kept.keys.view(-1, depth)
    described = TensorDescriptor.from_tensor(rows, [TURN, depth], _shared())
    launch(
        sums_kernel,
        (-(-samples // (_GROUPS * _ROWS)), probe.pairs),
        probe.pointers(described),
        probe.sizes(),
        D=depth,
        **_CONSTANTS,
        **LAUNCH,
    )


@lru_cache(maxsize=1)
def _shared() -> Any:
    """How keys lie in shared memory."""
    return gl.NVMMASharedLayout(128, 16, 2)


def _specimen(dtype: str, depth: int) -> Specimen:
    constants = {
        "D": depth,
        **_CONSTANTS,
    }
    keys = f"tensordesc<{dtype}[{TURN}, {depth}],{_shared()!r}>"
    return Specimen(
        f"sums {dtype} D={depth} on Hopper",
        sums_kernel,
        signature_of(sums_kernel, dtype, keys),
        constants,
        LAUNCH,
        least=90,
        most=90,
        aligned=("q_b", "q_h", "q_l"),
    )


_CONSTANTS = {
    "BN": TURN,
    "W": CELL,
    "STAGES": _STAGES,
    "GROUPS": _GROUPS,
    "ROWS": _ROWS,
}
LAUNCH = {"num_warps": 4, "maxnreg": 128}
SPECIMENS = [_specimen("bf16", 128), _specimen("fp16", 64)]
