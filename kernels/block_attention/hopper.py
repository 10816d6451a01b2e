"""The exact tiles of block attention on Hopper, in Gluon: what Triton itself would not schedule.

What the warps do is in `warps.py` and `bring.py`; here they are started.
"""

from functools import lru_cache
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from dit_accel.kernels.backends import multiprocessors
from dit_accel.kernels.block_attention.api import RestTerms
from dit_accel.kernels.block_attention.bring import producer
from dit_accel.kernels.block_attention.means import LEVELS, TURN, box_of
from dit_accel.kernels.block_attention.problem import Problem
from dit_accel.kernels.block_attention.tables import rest_tables
from dit_accel.kernels.block_attention.tile import TOLD
from dit_accel.kernels.block_attention.triton import WEIGHTS
from dit_accel.kernels.block_attention.warps import consumer
from dit_accel.kernels.gluon_names import before_hand_over
from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen

_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, order=[1, 0]))


class _Parts:
    """What the three groups of warps share."""

    q: gl.tensor
    q_b: gl.tensor
    q_h: gl.tensor
    q_l: gl.tensor
    q_perm: gl.tensor
    perm_b: gl.tensor
    perm_h: gl.tensor
    q_block: gl.tensor
    q_span: gl.tensor
    tile_b: gl.tensor
    tile_h: gl.tensor
    num_rows: gl.tensor
    long_tiles: gl.tensor
    listed: gl.tensor
    counts: gl.tensor
    num_tiles: gl.tensor
    taken: gl.tensor
    code: gl.tensor
    code_b: gl.tensor
    code_h: gl.tensor
    rest_bias: gl.tensor
    bias_b: gl.tensor
    bias_h: gl.tensor
    rest_turns: gl.tensor
    init: gl.tensor
    init_lse: gl.tensor
    out: gl.tensor
    out_b: gl.tensor
    out_h: gl.tensor
    out_l: gl.tensor
    lse: gl.tensor
    pairs: gl.tensor
    heads: gl.tensor
    length: gl.tensor
    table: gl.tensor
    rows: gl.tensor
    columns: gl.tensor
    by: gl.tensor
    scale: gl.tensor
    k_bufs: gl.shared_memory_descriptor
    v_bufs: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_ready: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor
    told: gl.shared_memory_descriptor
    told_ready: gl.shared_memory_descriptor
    told_free: gl.shared_memory_descriptor
    joined: gl.shared_memory_descriptor
    handed_free: gl.shared_memory_descriptor
    sums: gl.shared_memory_descriptor
    handed: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, *values):
        for name, value in zip(_FIELDS, values, strict=True):
            setattr(self, name, value)


_FIELDS = tuple(_Parts.__annotations__)
_Parts = aggregate(_Parts)  # type: ignore[misc]
_SIZES = ["pairs", "heads", "length", "table", "rows", "columns", "num_tiles", "num_rows"]
_SIZES += ["long_tiles", "rest_turns"]
_SIZES += [f"{name}_{axis}" for name in ("perm", "tile", "code", "bias") for axis in "bh"]


@gluon.jit(do_not_specialize=_SIZES)
def attend_kernel(
    q,
    table_rows,
    wide_rows,
    rows_2,
    rows_4,
    rows_8,
    rest_rows,
    q_perm,
    q_block,
    q_span,
    listed,
    counts,
    taken,
    code,
    rest_bias,
    init,
    init_lse,
    out,
    lse,
    pairs,
    heads,
    length,
    table,
    rows,
    columns,
    num_tiles,
    num_rows,
    long_tiles,
    rest_turns,
    scale,
    q_b,
    q_h,
    q_l,
    perm_b,
    perm_h,
    tile_b,
    tile_h,
    code_b,
    code_h,
    bias_b,
    bias_h,
    out_b,
    out_h,
    out_l,
    BOX: gl.constexpr,
    PER: gl.constexpr,
    WEIGHT: gl.constexpr,
    FIRST_ORDER: gl.constexpr,
    INIT: gl.constexpr,
    POOLED: gl.constexpr,
    D: gl.constexpr,
):
    dtype: gl.constexpr = table_rows.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    signal: gl.constexpr = mbarrier.MBarrierLayout()
    number: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    # with a weight, the variances take turns with the keys
    k_stages: gl.constexpr = 2 if WEIGHT == 0 else 3
    q_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], shared)
    k_bufs = gl.allocate_shared_memory(dtype, [k_stages, PER, D], shared)
    v_bufs = gl.allocate_shared_memory(dtype, [2, PER, D], shared)
    k_ready = gl.allocate_shared_memory(gl.int64, [k_stages, 1], signal)
    k_free = gl.allocate_shared_memory(gl.int64, [k_stages, 1], signal)
    v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
    v_free = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
    told = gl.allocate_shared_memory(gl.int32, [2 * TOLD, 1], number)
    told_ready = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
    told_free = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
    joined = gl.allocate_shared_memory(gl.int64, [1], signal)
    handed_free = gl.allocate_shared_memory(gl.int64, [1], signal)
    sums = gl.allocate_shared_memory(gl.float32, [2, 64], number)
    if WEIGHT != 0:
        square_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], shared)
        handed = sums
    else:
        square_bufs = q_bufs
        handed = gl.allocate_shared_memory(gl.float32, [64, D], _PLAIN)
    # what is read is free when both groups are done
    for stage in gl.static_range(k_stages):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
    for stage in gl.static_range(2):
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
        mbarrier.init(told_ready.index(stage), count=1)
        mbarrier.init(told_free.index(stage), count=2)
    if WEIGHT == 0:  # else nobody waits there
        mbarrier.init(joined, count=1)
        mbarrier.init(handed_free, count=1)
    parts = _Parts(
        q,
        gl.to_tensor(q_b),
        gl.to_tensor(q_h),
        gl.to_tensor(q_l),
        q_perm,
        perm_b,
        perm_h,
        q_block,
        q_span,
        tile_b,
        tile_h,
        num_rows,
        long_tiles,
        listed,
        counts,
        num_tiles,
        taken,
        code,
        code_b,
        code_h,
        rest_bias,
        bias_b,
        bias_h,
        rest_turns,
        init,
        init_lse,
        out,
        gl.to_tensor(out_b),
        gl.to_tensor(out_h),
        gl.to_tensor(out_l),
        lse,
        pairs,
        heads,
        length,
        table,
        rows,
        columns,
        scale * 1.4426950408889634,
        scale,
        k_bufs,
        v_bufs,
        k_ready,
        k_free,
        v_ready,
        v_free,
        told,
        told_ready,
        told_free,
        joined,
        handed_free,
        sums,
        handed,
    )
    q_0, q_1 = q_bufs.index(0), q_bufs.index(1)
    square_0, square_1 = square_bufs.index(0), square_bufs.index(1)
    wide = table_rows if BOX == 64 else wide_rows
    pooled = (rows_2, rows_4, rows_8) if POOLED else (wide, wide, wide)
    # constants would be none if these tuples had names
    before_hand_over()
    gl.warp_specialize(
        [
            (consumer, (parts, 0, q_0, square_0, BOX, WEIGHT, FIRST_ORDER, INIT, POOLED)),
            (consumer, (parts, 1, q_1, square_1, BOX, WEIGHT, FIRST_ORDER, INIT, POOLED)),
            (
                producer,
                (parts, table_rows, wide, pooled, rest_rows, BOX, WEIGHT, FIRST_ORDER, POOLED),
            ),
        ],
        [4, 1],
        [232 if POOLED else 240, 40 if POOLED else 24],
    )


def attend(
    problem: Problem,
    rest: RestTerms | None,
    box: int,
    onto: tuple[Tensor, Tensor] | None = None,
    levels: bool = False,
    long_tiles: int = 0,
) -> None:
    """A whole problem, on top of a partial if there is one.

    Args:
        problem: in fp16 or bf16, head size 64 or 128, tiles of 128 queries and ``box`` keys.
        rest: what stands in for the blocks of code -1.
        box: tokens of a key tile: 64, 32, 16 or 8.
        onto: attention over other keys, ``out`` ``[B, H, L, D]`` and ``lse`` ``[B, H, L]``.
        levels: the lists are of `levels.packed_levels`.
        long_tiles: of a head's tiles of queries, the last ones, that all heads begin with.
    """
    q, out = problem.q, problem.out
    init, init_lse = (x.contiguous() for x in onto or (out, problem.lse))
    batch, heads, length, depth = q.shape
    columns = problem.code.shape[3]
    terms = rest_tables(rest, q, problem.scale)
    boxes = {"table_rows": box, "wide_rows": 64 if box != 64 else None}
    boxes |= {f"rows_{level}": box_of(level, box) if levels else None for level in LEVELS[1:]}
    described = [
        None if size is None else _described(problem.table, size) for size in boxes.values()
    ]
    # a rest that is not there has no turns, and its descriptor stands for nothing
    wide = described[1] or described[0]
    described.append(wide if rest is None else _described(terms["rows"], 64))
    launch(
        attend_kernel,
        (min(multiprocessors(q.device), problem.grid[0] * problem.grid[1]),),
        (
            q,
            *described,
            problem.queries.perm,
            *problem.q_tiles,
            problem.listed,
            problem.counts,
            problem.taken,
            problem.code,
            terms["bias"],
            init,
            init_lse,
            out,
            problem.lse,
        ),
        (
            batch * heads,
            heads,
            length,
            problem.keys.shape[2],
            problem.code.shape[2],
            columns,
            problem.listed.shape[-1],
            problem.grid[0],
            long_tiles,
            0 if rest is None else -(-columns // TURN),
            problem.scale,
            *q.stride()[:3],
            *lead_strides(problem.queries.perm),
            *lead_strides(problem.q_tiles.span),
            *lead_strides(problem.code),
            *lead_strides(terms["bias"]),
            *out.stride()[:3],
        ),
        BOX=box,
        PER=TURN,
        WEIGHT=0 if rest is None else WEIGHTS[rest.weight],
        FIRST_ORDER=rest is not None and rest.cov_sum is not None,
        INIT=onto is not None,
        POOLED=levels,
        D=depth,
        **LAUNCH,
    )


def _described(rows: Tensor, box: int) -> Any:
    return TensorDescriptor.from_tensor(rows, [box, rows.shape[-1]], shared_layout())


@lru_cache(maxsize=1)
def shared_layout() -> Any:
    """How rows lie in shared memory."""
    return gl.NVMMASharedLayout(128, 16, 2)


def _specimen(
    dtype: str, depth: int, box: int, weight: int, first_order: bool, pooled: bool = False
) -> Specimen:
    sizes = {"table_rows": box, "rest_rows": 64}
    if box != 64:
        sizes["wide_rows"] = 64
    if pooled:
        sizes |= {f"rows_{level}": box_of(level, box) for level in LEVELS[1:]}
    signature = {
        **dict.fromkeys(("q", "init", "out"), f"*{dtype}"),
        **dict.fromkeys(("q_perm", "q_block", "q_span", "listed", "counts", "taken"), "*i32"),
        **dict.fromkeys(("init_lse", "lse", "rest_bias"), "*fp32"),
        **{
            name: f"tensordesc<{dtype}[{size}, {depth}],{shared_layout()!r}>"
            for name, size in sizes.items()
        },
        "code": "*i8",
        "scale": "fp32",
    }
    constants = {
        "BOX": box,
        "PER": TURN,
        "WEIGHT": weight,
        "FIRST_ORDER": first_order,
        "INIT": False,
        "POOLED": pooled,
        "D": depth,
        **dict.fromkeys({"wide_rows", "rows_2", "rows_4", "rows_8"} - set(sizes)),
    }
    names = attend_kernel.arg_names
    signature |= {n: "i32" for n in names if n not in signature and n not in constants}
    name = f"attend {dtype} D{depth} box {box} weight {weight}{' first order' * first_order}"
    name += " levels" * pooled
    return Specimen(name, attend_kernel, signature, constants, LAUNCH, least=90, most=90)


LAUNCH = {"num_warps": 4, "maxnreg": 168}
SPECIMENS = [
    _specimen("bf16", 128, 64, 0, True),
    _specimen("bf16", 128, 64, 1, True),
    _specimen("bf16", 128, 16, 0, False),
    _specimen("fp16", 128, 64, 2, True),
    _specimen("bf16", 64, 64, 1, True),
    _specimen("bf16", 64, 8, 0, False),
    _specimen("bf16", 128, 64, 0, False, pooled=True),
    _specimen("fp16", 64, 16, 0, False, pooled=True),
]
