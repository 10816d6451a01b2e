"""The count as a kernel: a run of rows a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed

_ROWS, _COLUMNS = 8, 256
_PROGRAMS = 1024
"""Rows of a head that are counted by one program, which leaves no sum to be added up."""
_SIZES = ["heads", "rows", "columns", "run"]
_SIZES += [f"{name}_{axis}" for name in ("code", "key", "query") for axis in "bh"]
_SIZES.append("code_l")


@triton.jit(do_not_specialize=_SIZES)
def count_kernel(
    code,
    keys,
    queries,
    found,
    heads,
    rows,
    columns,
    run,
    code_b,
    code_h,
    code_l,
    key_b,
    key_h,
    query_b,
    query_h,
    WEIGHED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    codes = code + b * code_b + h * code_h
    total = tl.zeros([ROWS], tl.int64)
    for first in range(part * run, tl.minimum(part * run + run, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        each = tl.zeros([ROWS], tl.int32)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            known = column < columns
            length = tl.load(keys + b * key_b + h * key_h + column, mask=known, other=0)
            where = row[:, None].to(tl.int64) * code_l + column[None, :]
            both = (row < rows)[:, None] & known[None, :]
            kind = tl.load(codes + where, mask=both, other=0)
            each += tl.sum(tl.where(kind == 1, length.to(tl.int32)[None, :], 0), 1)
        if WEIGHED:
            size = tl.load(queries + b * query_b + h * query_h + row, mask=row < rows, other=0)
            total += each.to(tl.int64) * size.to(tl.int64)
        else:
            total += each.to(tl.int64)
    tl.store(found + head.to(tl.int64) * tl.num_programs(0) + part, tl.sum(total, 0))


def pair_count(code: Tensor, keys: Tensor, queries: Tensor | None) -> Tensor:
    sizes = keys if queries is None else queries
    given = (code, keys, sizes)
    batch, heads = (max(x.shape[axis] for x in given) for axis in (0, 1))
    rows, columns = code.shape[2:]
    # a selection by token may be gigabytes, and its rows apart: no copy of it
    code = (code if code.stride(3) == 1 else code.contiguous()).view(torch.int8)
    keys, sizes = keys.contiguous(), sizes.contiguous()
    run = max(_ROWS, min(_PROGRAMS, 2**19 // max(1, columns)) // _ROWS * _ROWS)
    parts = max(1, -(-rows // run))
    found = torch.empty(batch, heads, parts, dtype=torch.int64, device=code.device)
    launch(
        count_kernel,
        (parts, batch * heads),
        (code, keys, sizes, found),
        (
            *(heads, rows, columns, run, *lead_strides(code), code.stride(2)),
            *(*lead_strides(keys), *lead_strides(sizes)),
        ),
        WEIGHED=queries is not None,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
    return found.squeeze(-1) if parts == 1 else found.sum(-1)


def _specimen(kind: str, weighed: bool) -> Specimen:
    constants = {"WEIGHED": weighed, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    types = {"code": "*i8", "keys": f"*{kind}", "queries": f"*{kind}", "found": "*i64"}
    signature = typed(count_kernel, constants, **types)
    name = f"pairs of {kind}{' weighed' * weighed}"
    return Specimen(name, count_kernel, signature, constants, {"num_warps": 4})


SPECIMENS = (
    [_specimen("i32", True), _specimen("i64", False)]
    if isinstance(count_kernel, triton.JITFunction)
    else []
)
