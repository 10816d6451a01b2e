"""The count as a kernel: a run of rows a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.specimen import Specimen, typed
from dit_accel.kernels.word_bits import word_bit
from dit_accel.kernels.words import Words, grouping

_ROWS, _COLUMNS = 32, 256
_TOKENS = 256
_RUN = 4096
"""Tokens whose words are counted by one program."""
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
    lane = tl.arange(0, ROWS)
    some = codes + part.to(tl.int64) * run * code_l  # offsets from here are small
    for first in range(part * run, tl.minimum(part * run + run, rows), ROWS):
        row = first + lane
        each = tl.zeros([ROWS], tl.int32)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            known = column < columns
            length = tl.load(keys + b * key_b + h * key_h + column, mask=known, other=0)
            both = (row < rows)[:, None] & known[None, :]
            kind = tl.load(some + lane[:, None] * code_l + column[None, :], mask=both, other=0)
            each += tl.sum(tl.where(kind == 1, length.to(tl.int32)[None, :], 0), 1)
        some += ROWS * code_l
        if WEIGHED:
            size = tl.load(queries + b * query_b + h * query_h + row, mask=row < rows, other=0)
            total += each.to(tl.int64) * size.to(tl.int64)
        else:
            total += each.to(tl.int64)
    tl.store(found + head.to(tl.int64) * tl.num_programs(0) + part, tl.sum(total, 0))


@triton.jit(do_not_specialize=["heads", "length", "groups", "size", "blocks", "key_b", "key_h"])
def words_kernel(
    words,
    keys,
    found,
    heads,
    length,
    groups,
    size,
    blocks,
    word_b,
    word_h,
    key_b,
    key_h,
    TOKENS: tl.constexpr,
    RUN: tl.constexpr,
):
    """The pairs of a head, a group of blocks and a run of tokens."""
    group, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    words += b * word_b + h * word_h + group.to(tl.int64) * length
    bit = tl.arange(0, 16)
    number = word_bit(bit)  # bits are turned around, and so turned back
    column = group * size + number
    known = (number < size) & (column < blocks)
    worth = tl.load(keys + b * key_b + h * key_h + column, mask=known, other=0)
    counts = tl.zeros([TOKENS, 16], tl.int32)
    for first in range(part * RUN, tl.minimum(part * RUN + RUN, length), TOKENS):
        token = first + tl.arange(0, TOKENS)
        word = tl.load(words + token, mask=token < length, other=0).to(tl.int32)
        counts += (word[:, None] >> bit[None, :]) & 1
    total = tl.sum(counts, 0).to(tl.int64) * worth.to(tl.int64)
    at = (head.to(tl.int64) * tl.num_programs(1) + part) * groups + group
    tl.store(found + at, tl.sum(total, 0))


def _of_words(words: Words, keys: Tensor) -> Tensor:
    word, keys = words.word.contiguous(), keys.contiguous()
    batch, heads = (max(x.shape[axis] for x in (word, keys)) for axis in (0, 1))
    groups, size = grouping(words.blocks)
    parts = max(1, -(-word.shape[3] // _RUN))
    found = torch.empty(batch, heads, parts * groups, dtype=torch.int64, device=word.device)
    launch(
        words_kernel,
        (groups, parts, batch * heads),
        (word, keys, found),
        (
            *(heads, word.shape[3], groups, size, words.blocks),
            *(*lead_strides(word), *lead_strides(keys)),
        ),
        TOKENS=_TOKENS,
        RUN=_RUN,
        num_warps=4,
    )
    return found.sum(-1)


def pair_count(code: Tensor | Words, keys: Tensor, queries: Tensor | None) -> Tensor:
    if isinstance(code, Words):
        return _of_words(code, keys)
    sizes = keys if queries is None else queries
    given = (code, keys, sizes)
    batch, heads = (max(x.shape[axis] for x in given) for axis in (0, 1))
    rows, columns = code.shape[2:]
    # a selection by token may be gigabytes, and its rows apart: no copy of it
    code = (code if code.stride(3) == 1 else code.contiguous()).view(torch.int8)
    keys, sizes = keys.contiguous(), sizes.contiguous()
    run = max(_ROWS, min(_PROGRAMS, 2**20 // max(1, columns)) // _ROWS * _ROWS)
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
        num_warps=8,
    )
    return found.squeeze(-1) if parts == 1 else found.sum(-1)


def _specimen(kind: str, weighed: bool) -> Specimen:
    constants = {"WEIGHED": weighed, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    types = {"code": "*i8", "keys": f"*{kind}", "queries": f"*{kind}", "found": "*i64"}
    signature = typed(count_kernel, constants, **types)
    name = f"pairs of {kind}{' weighed' * weighed}"
    return Specimen(name, count_kernel, signature, constants, {"num_warps": 8})


def _specimen_of_words() -> Specimen:
    constants = {"TOKENS": _TOKENS, "RUN": _RUN}
    types = {"words": "*i16", "keys": "*i32", "found": "*i64"}
    signature = typed(words_kernel, constants, **types)
    return Specimen("pairs of words", words_kernel, signature, constants, {"num_warps": 4})


SPECIMENS = (
    [_specimen("i32", True), _specimen("i64", False), _specimen_of_words()]
    if isinstance(count_kernel, triton.JITFunction)
    else []
)
