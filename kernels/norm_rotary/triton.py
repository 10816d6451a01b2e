"""Norms and rotary embedding as a kernel: each token read once and written once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import launch
from dit_accel.kernels.norm_rotary.api import Stream
from dit_accel.kernels.specimen import Specimen, typed

_TILE = 1024
"""Channels of a token that a program takes at a time: 8 for each thread of 4 warps."""


_NORMS = {None: 0, "head": 1, "token": 2}


@triton.jit
def _loaded(x, head, depth, stride, HEADS: tl.constexpr, MASK: tl.constexpr):
    """Some heads of a token, in fp32; zero beyond the last."""
    where = x + head[:, None] * stride + depth[None, :]
    if MASK:
        return tl.load(where, mask=(head < HEADS)[:, None], other=0.0).to(tl.float32)
    return tl.load(where).to(tl.float32)


@triton.jit
def _stored(x, head, depth, stride, values, HEADS: tl.constexpr, MASK: tl.constexpr):
    where = x + head[:, None] * stride + depth[None, :]
    if MASK:
        tl.store(where, values.to(x.dtype.element_ty), mask=(head < HEADS)[:, None])
    else:
        tl.store(where, values.to(x.dtype.element_ty))


@triton.jit
def _finished(
    x,
    weight,
    head,
    depth,
    cos,
    sin,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PART: tl.constexpr,
    MASK: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    TURN: tl.constexpr,
):
    """Times the weight, and turned."""
    if WEIGHT:
        if NORM == 2:
            x *= _loaded(weight, head, depth, D, HEADS, MASK)
        else:
            x *= tl.load(weight + depth).to(tl.float32)[None, :]
    if TURN:
        even, odd = tl.split(tl.reshape(x, [PART, D // 2, 2]))
        turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        x = tl.reshape(turned, [PART, D])
    return x


@triton.jit
def _one(
    x,
    weight,
    out,
    cos,
    sin,
    eps,
    x_h,
    out_h,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PART: tl.constexpr,
    STEPS: tl.constexpr,
    MASK: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    TURN: tl.constexpr,
):
    """A token's queries, or its keys: 0 no norm, 1 over each head, 2 over all channels."""
    depth = tl.arange(0, D)
    some = tl.arange(0, PART)
    parts = (_loaded(x, some, depth, x_h, HEADS, MASK),)
    for i in tl.static_range(1, STEPS):
        part = _loaded(x, some + i * PART, depth, x_h, HEADS, MASK)
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
    if NORM == 2:
        squares = parts[0] * parts[0]
        for i in tl.static_range(1, STEPS):
            squares += parts[i] * parts[i]
        total = tl.sum(tl.sum(squares, 1), 0)
        by = tl.rsqrt(total / (HEADS * D) + eps)
    for i in tl.static_range(STEPS):
        part = parts[i]
        if NORM == 2:
            part = part * by
        elif NORM == 1:
            part = part * tl.rsqrt(tl.sum(part * part, 1) / D + eps)[:, None]
        head = some + i * PART
        part = _finished(
            part, weight, head, depth, cos, sin, HEADS, D, PART, MASK, NORM, WEIGHT, TURN
        )
        _stored(out, head, depth, out_h, part, HEADS, MASK)


@triton.jit(do_not_specialize=["start", "q_eps", "k_eps"])
def norm_rotary_kernel(
    q,
    k,
    v,
    q_weight,
    k_weight,
    cos,
    sin,
    tokens,
    q_out,
    k_out,
    v_out,
    start,
    q_eps,
    k_eps,
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    cos_l,
    cos_d,
    sin_l,
    sin_d,
    out_b,
    out_l,
    out_h,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PART: tl.constexpr,
    STEPS: tl.constexpr,
    MASK: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    TURN: tl.constexpr,
    VALUES: tl.constexpr,
    ORDER: tl.constexpr,
):
    """A token of a batch element: its queries, its keys and, if wanted, its values."""
    b = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64)
    target = b * out_b + (start + place) * out_l
    token = place
    if ORDER:
        token = tl.load(tokens + place).to(tl.int64)
    turn = start + token
    c = 0.0
    s = 0.0
    if TURN:
        pair = tl.arange(0, D // 2)
        c = tl.load(cos + turn * cos_l + pair * cos_d).to(tl.float32)[None, :]
        s = tl.load(sin + turn * sin_l + pair * sin_d).to(tl.float32)[None, :]
    _one(
        q + b * q_b + token * q_l,
        q_weight,
        q_out + target,
        c,
        s,
        q_eps,
        q_h,
        out_h,
        HEADS,
        D,
        PART,
        STEPS,
        MASK,
        NORM,
        WEIGHT,
        TURN,
    )
    _one(
        k + b * k_b + token * k_l,
        k_weight,
        k_out + target,
        c,
        s,
        k_eps,
        k_h,
        out_h,
        HEADS,
        D,
        PART,
        STEPS,
        MASK,
        NORM,
        WEIGHT,
        TURN,
    )
    if VALUES:
        depth = tl.arange(0, D)
        for i in tl.static_range(STEPS):
            head = i * PART + tl.arange(0, PART)
            part = _loaded(v + b * v_b + token * v_l, head, depth, v_h, HEADS, MASK)
            _stored(v_out + target, head, depth, out_h, part, HEADS, MASK)


@lru_cache(maxsize=64)
def _constants(heads: int, depth: int) -> dict[str, int]:
    """Heads that are taken at a time, how many times, whether the last are fewer, and warps."""
    most = max(1, _TILE // depth)
    part = min(most, heads & -heads)
    if part < min(4, most):
        part = min(most, triton.next_power_of_2(heads))
    return {
        **{"HEADS": heads, "D": depth, "PART": part, "STEPS": -(-heads // part)},
        **{"MASK": heads % part != 0, "num_warps": max(1, min(4, part * depth // 256))},
    }


@torch.no_grad()
def norm_rotary(
    streams: Sequence[Stream],
    norm: str | None,
    cos: Tensor | None,
    sin: Tensor | None,
    dtype: torch.dtype,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    like = streams[0].q
    batch, _, heads, depth = like.shape
    single = len(streams) == 1
    length = like.shape[1] if single else sum(stream.q.shape[1] for stream in streams)
    values = not single or order is not None
    q = torch.empty((batch, length, heads, depth), dtype=dtype, device=like.device)
    k = torch.empty_like(q)
    v = torch.empty_like(q, dtype=like.dtype) if values else streams[0].v
    start = 0
    for stream in streams:
        stop = start + stream.q.shape[1]
        turn = cos is not None and stop <= cos.shape[0]
        _launch(stream, (q, k, v), start, norm, cos if turn else None, sin, order, values)
        start = stop
    return q, k, v


def _launch(
    stream: Stream,
    out: tuple[Tensor, Tensor, Tensor],
    start: int,
    norm: str | None,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor | None,
    values: bool,
) -> None:
    """Write a stream's tokens from row ``start`` of the result on."""
    q, k, v = stream.q, stream.k, stream.v
    q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    if not q_strides[3] == k_strides[3] == v_strides[3] == 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    batch, length, heads, depth = q.shape
    if not batch * length:
        return
    # what is not there is never read, but must be somewhere
    weights, weighted = (q, k), False
    if stream.q_weight is not None and stream.k_weight is not None:
        weights, weighted = (stream.q_weight.contiguous(), stream.k_weight.contiguous()), True
    turn = cos is not None and sin is not None
    angles = (cos, sin) if cos is not None and sin is not None else (q, q)
    launch(
        norm_rotary_kernel,
        (length, batch),
        (q, k, v, *weights, *angles, q if order is None else order, *out),
        (
            *(start, stream.q_eps, stream.k_eps, *q_strides[:3], *k_strides[:3], *v_strides[:3]),
            *(*angles[0].stride()[:2], *angles[1].stride()[:2], *out[0].stride()[:3]),
        ),
        NORM=_NORMS[norm],
        WEIGHT=weighted,
        TURN=turn,
        VALUES=values,
        ORDER=order is not None,
        **_constants(heads, depth),
    )


def _specimen(name: str, dtype: str, heads: int, depth: int, **switches: int) -> Specimen:
    constants: dict[str, int] = {
        **_constants(heads, depth),
        **{"WEIGHT": True, "TURN": True, "VALUES": False, "ORDER": False},
        **switches,
    }
    options = {"num_warps": constants.pop("num_warps")}
    tensors = ("q", "k", "v", "q_weight", "k_weight", "q_out", "k_out", "v_out")
    types = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(("cos", "sin"), "*fp32")
    types |= {"tokens": "*i32", "q_eps": "fp32", "k_eps": "fp32"}
    signature = typed(norm_rotary_kernel, constants, **types)
    strides = tuple(n for n in signature if n[-2:] in ("_b", "_l", "_h"))
    return Specimen(name, norm_rotary_kernel, signature, constants, options, aligned=strides)


SPECIMENS = (
    [
        _specimen("norm_rotary bf16 40 x 128 by token", "bf16", 40, 128, NORM=2),
        _specimen("norm_rotary bf16 12 x 128 by token", "bf16", 12, 128, NORM=2),
        _specimen("norm_rotary bf16 24 x 128 joined", "bf16", 24, 128, NORM=1, VALUES=True),
        _specimen("norm_rotary fp32 24 x 64", "fp32", 24, 64, NORM=1),
        _specimen(
            "norm_rotary bf16 40 x 128 ordered", "bf16", 40, 128, NORM=2, VALUES=True, ORDER=True
        ),
    ]
    if isinstance(norm_rotary_kernel, triton.JITFunction)
    else []
)
