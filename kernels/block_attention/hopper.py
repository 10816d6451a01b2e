"""The exact tiles of block attention on Hopper, in Gluon: what Triton itself would not schedule.

What the warps do is in `warps.py`; here they are started.
"""

from functools import lru_cache
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from dit_accel.kernels.block_attention.api import RestTerms
from dit_accel.kernels.block_attention.levels import LEVELS, TURN, box_of
from dit_accel.kernels.block_attention.problem import Problem
from dit_accel.kernels.block_attention.tables import rest_tables
from dit_accel.kernels.block_attention.triton import WEIGHTS
from dit_accel.kernels.block_attention.warps import consumer, producer
from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import LENGTH_BITS, START_BIT
from dit_accel.kernels.specimen import Specimen

_BITS = gl.constexpr(START_BIT)
_MASK = gl.constexpr((1 << LENGTH_BITS) - 1)
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, order=[1, 0]))


class _Parts:
    """What the three groups of warps share."""

    q: gl.tensor
    tokens: gl.tensor
    count: gl.tensor
    alone: gl.tensor
    q_l: gl.tensor
    init: gl.tensor
    init_lse: gl.tensor
    out: gl.tensor
    out_l: gl.tensor
    lse: gl.tensor
    entries: gl.tensor
    turns: gl.tensor
    turn_1: gl.tensor
    turn_2: gl.tensor
    turn_3: gl.tensor
    plain_0: gl.tensor
    plain_1: gl.tensor
    plain_2: gl.tensor
    plain_3: gl.tensor
    by: gl.tensor
    scale: gl.tensor
    code: gl.tensor
    columns: gl.tensor
    rest_bias: gl.tensor
    rest_turns: gl.tensor
    row: gl.tensor
    rest_row: gl.tensor
    cov_row: gl.tensor
    keys: tma.tensor_descriptor
    values: tma.tensor_descriptor
    wide_keys: tma.tensor_descriptor
    wide_values: tma.tensor_descriptor
    rest_keys: tma.tensor_descriptor
    rest_values: tma.tensor_descriptor
    rest_var: tma.tensor_descriptor
    cov: tma.tensor_descriptor
    k_bufs: gl.shared_memory_descriptor
    v_bufs: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_ready: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor
    cov_ready: gl.shared_memory_descriptor
    joined: gl.shared_memory_descriptor
    sums: gl.shared_memory_descriptor
    handed: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, *values):
        for name, value in zip(_FIELDS, values, strict=True):
            setattr(self, name, value)


_FIELDS = tuple(_Parts.__annotations__)
_Parts = aggregate(_Parts)  # type: ignore[misc]
_SIZES = ["heads", "length", "table", "rows", "columns", "num_tiles", "num_rows", "rest_turns"]
_SIZES += [f"{name}_{axis}" for name in ("perm", "tile", "code", "bias") for axis in "bh"]


@gluon.jit(do_not_specialize=_SIZES)
def attend_kernel(
    q,
    keys,
    values,
    wide_keys,
    wide_values,
    keys_2,
    values_2,
    keys_4,
    values_4,
    keys_8,
    values_8,
    rest_keys,
    rest_values,
    rest_var,
    cov,
    q_perm,
    q_block,
    q_span,
    listed,
    counts,
    code,
    rest_bias,
    init,
    init_lse,
    out,
    lse,
    heads,
    length,
    table,
    rows,
    columns,
    num_tiles,
    num_rows,
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
    head = gl.program_id(1)
    b = (head // heads).to(gl.int64)
    h = (head % heads).to(gl.int64)
    # the tiles that were cut last are text, whose rows are long: they go first
    at = b * tile_b + h * tile_h + num_rows - 1 - gl.program_id(0)
    span = gl.load(q_span + at)
    if span != 0:
        block = gl.load(q_block + at) >> 4
        row = head.to(gl.int64) * rows + block
        dtype: gl.constexpr = keys.dtype
        shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        signal: gl.constexpr = mbarrier.MBarrierLayout()
        # with a weight, the variances take turns with the keys
        k_stages: gl.constexpr = 2 if WEIGHT == 0 else 3
        q_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], shared)
        k_bufs = gl.allocate_shared_memory(dtype, [k_stages, PER, D], shared)
        v_bufs = gl.allocate_shared_memory(dtype, [2, PER, D], shared)
        k_ready = gl.allocate_shared_memory(gl.int64, [k_stages, 1], signal)
        k_free = gl.allocate_shared_memory(gl.int64, [k_stages, 1], signal)
        v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
        v_free = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
        cov_ready = gl.allocate_shared_memory(gl.int64, [1], signal)
        joined = gl.allocate_shared_memory(gl.int64, [1], signal)
        sums = gl.allocate_shared_memory(
            gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        )
        if WEIGHT != 0:
            square_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], shared)
            handed = sums
        else:
            square_bufs = q_bufs
            handed = gl.allocate_shared_memory(gl.float32, [64, D], _PLAIN)
        for stage in gl.static_range(k_stages):
            mbarrier.init(k_ready.index(stage), count=1)
        for stage in gl.static_range(2):
            mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(cov_ready, count=1)
        mbarrier.init(joined, count=1)
        # a buffer is free when all that read it are done
        alone = ((span & _MASK) <= 64).to(gl.int32)
        if WEIGHT == 0:
            if alone == 1:
                for stage in gl.static_range(2):
                    mbarrier.init(k_free.index(stage), count=1)
                    mbarrier.init(v_free.index(stage), count=1)
            else:
                for stage in gl.static_range(2):
                    mbarrier.init(k_free.index(stage), count=2)
                    mbarrier.init(v_free.index(stage), count=2)
        else:
            for stage in gl.static_range(k_stages):
                mbarrier.init(k_free.index(stage), count=2)
            for stage in gl.static_range(2):
                mbarrier.init(v_free.index(stage), count=2)
        # where each level's turns begin, and where they stop being plain
        boxes: gl.constexpr = PER // BOX
        if POOLED:
            own = counts + row * 8
            plain_0 = gl.load(own) // boxes
            turn_1 = (gl.load(own + 1) + boxes - 1) // boxes
            boxes_1: gl.constexpr = PER // keys_2.block_shape[0]
            plain_1 = turn_1 + gl.load(own + 2) // boxes_1
            turn_2 = turn_1 + (gl.load(own + 3) + boxes_1 - 1) // boxes_1
            boxes_2: gl.constexpr = PER // keys_4.block_shape[0]
            plain_2 = turn_2 + gl.load(own + 4) // boxes_2
            turn_3 = turn_2 + (gl.load(own + 5) + boxes_2 - 1) // boxes_2
            boxes_3: gl.constexpr = PER // keys_8.block_shape[0]
            plain_3 = turn_3 + gl.load(own + 6) // boxes_3
            turns = turn_3 + (gl.load(own + 7) + boxes_3 - 1) // boxes_3
        else:
            plain_0 = gl.load(counts + row * 2) // boxes
            turns = (gl.load(counts + row * 2 + 1) + boxes - 1) // boxes
            turn_1 = turns
            turn_2 = turns
            turn_3 = turns
            plain_1 = turns
            plain_2 = turns
            plain_3 = turns
        parts = _Parts(
            q + b * q_b + h * q_h,
            q_perm + b * perm_b + h * perm_h + (span >> _BITS),
            span & _MASK,
            alone,
            gl.to_tensor(q_l),
            init + head.to(gl.int64) * length * D,
            init_lse + head.to(gl.int64) * length,
            out + b * out_b + h * out_h,
            gl.to_tensor(out_l),
            lse + head.to(gl.int64) * length,
            listed + row * num_tiles,
            turns,
            turn_1,
            turn_2,
            turn_3,
            plain_0,
            plain_1,
            plain_2,
            plain_3,
            scale * 1.4426950408889634,
            scale,
            code + b * code_b + h * code_h + block.to(gl.int64) * columns,
            columns,
            rest_bias + b * bias_b + h * bias_h,
            rest_turns,
            head * table,
            head * columns,
            head * D,
            keys,
            values,
            wide_keys,
            wide_values,
            rest_keys,
            rest_values,
            rest_var,
            cov,
            k_bufs,
            v_bufs,
            k_ready,
            k_free,
            v_ready,
            v_free,
            cov_ready,
            joined,
            sums,
            handed,
        )
        q_0, q_1 = q_bufs.index(0), q_bufs.index(1)
        square_0, square_1 = square_bufs.index(0), square_bufs.index(1)
        pooled = (keys_2, values_2, keys_4, values_4, keys_8, values_8)
        # constants would be none if these tuples had names
        gl.warp_specialize(
            [
                (consumer, (parts, 0, q_0, square_0, BOX, WEIGHT, FIRST_ORDER, INIT, POOLED)),
                (consumer, (parts, 1, q_1, square_1, BOX, WEIGHT, FIRST_ORDER, INIT, POOLED)),
                (producer, (parts, pooled, BOX, WEIGHT, FIRST_ORDER, POOLED)),
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
) -> None:
    """A whole problem, on top of a partial if there is one.

    Args:
        problem: in fp16 or bf16, head size 64 or 128, tiles of 128 queries and ``box`` keys.
        rest: what stands in for the blocks of code -1.
        box: tokens of a key tile: 64, 32, 16 or 8.
        onto: attention over other keys, ``out`` ``[B, H, L, D]`` and ``lse`` ``[B, H, L]``.
        levels: the lists are of `levels.packed_levels`.
    """
    q, out = problem.q, problem.out
    init, init_lse = (x.contiguous() for x in onto or (out, problem.lse))
    heads, length, depth = q.shape[1:]
    columns = problem.code.shape[3]
    terms = rest_tables(rest, q, problem.scale)
    # a rest that is not there has no turns, and its descriptors stand for nothing
    tables = [terms[name] if rest is not None else problem.keys for name in ("k", "v")]
    weight = 0 if rest is None else WEIGHTS[rest.weight]
    first_order = rest is not None and rest.cov_sum is not None
    tables.append(terms["var"] if weight else tables[0])
    tables.append(terms["cov"] if first_order else tables[0])
    sizes = (box, 64, *(box_of(level, box) if levels else box for level in LEVELS[1:]))
    launch(
        attend_kernel,
        problem.grid,
        (
            q,
            *(_described(x, size) for size in sizes for x in (problem.keys, problem.values)),
            *(_described(x, 64) for x in tables),
            problem.queries.perm,
            *problem.q_tiles,
            problem.listed,
            problem.counts,
            problem.code,
            terms["bias"],
            init,
            init_lse,
            out,
            problem.lse,
        ),
        (
            heads,
            length,
            problem.keys.shape[2],
            problem.code.shape[2],
            columns,
            problem.listed.shape[-1],
            problem.grid[0],
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
        WEIGHT=weight,
        FIRST_ORDER=first_order,
        INIT=onto is not None,
        POOLED=levels,
        D=depth,
        **LAUNCH,
    )


def _described(x: Tensor, box: int) -> Any:
    rows = x.view(-1, x.shape[-1])
    return TensorDescriptor.from_tensor(rows, [box, x.shape[-1]], shared_layout())


@lru_cache(maxsize=1)
def shared_layout() -> Any:
    """How rows lie in shared memory."""
    return gl.NVMMASharedLayout(128, 16, 2)


def _specimen(
    dtype: str, depth: int, box: int, weight: int, first_order: bool, pooled: bool = False
) -> Specimen:
    sizes = {level: box_of(level, box) if pooled else box for level in LEVELS[1:]}
    bits = {
        size: f"tensordesc<{dtype}[{size}, {depth}],{shared_layout()!r}>"
        for size in (box, 64, *sizes.values())
    }
    signature = {
        **dict.fromkeys(("q", "init", "out"), f"*{dtype}"),
        **dict.fromkeys(("q_perm", "q_block", "q_span", "listed", "counts"), "*i32"),
        **dict.fromkeys(("init_lse", "lse", "rest_bias"), "*fp32"),
        **dict.fromkeys(("keys", "values"), bits[box]),
        **dict.fromkeys(("wide_keys", "wide_values"), bits[64]),
        **{f"keys_{level}": bits[size] for level, size in sizes.items()},
        **{f"values_{level}": bits[size] for level, size in sizes.items()},
        **dict.fromkeys(("rest_keys", "rest_values", "rest_var", "cov"), bits[64]),
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
