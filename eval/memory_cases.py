"""Operations that memory bounds, as `bench_kernels` times and checks them: norms and rotary
embedding beside the arithmetic that diffusers has for them, and the statistics of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.eval.kernel_cases import Case, Shape
from dit_accel.eval.kernel_checks import IncorrectError, Problem
from dit_accel.kernels.block_summary import block_mean, block_summary
from dit_accel.kernels.norm_rotary import Stream, norm_rotary
from dit_accel.layout import Gilbert
from dit_accel.types import Context

EPS = 1e-6
_Arithmetic = Callable[[], tuple[Tensor, Tensor, Tensor]]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[B, L, H, D]`` in the steps that diffusers takes for FLUX and
    HunyuanVideo, with angles ``[L, D]``.
    """
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    across = torch.stack([-imaginary, real], dim=-1).flatten(3)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    return (x.float() * cos + across.float() * sin).to(x.dtype)


def turned_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in the steps that it takes for Wan."""
    even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos[None, :, None, 0::2], sin[None, :, None, 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def _angles(length: int, depth: int, device: str) -> tuple[Tensor, Tensor]:
    speed = 10000.0 ** -torch.arange(0, 1, 2 / depth, device=device)
    angle = torch.outer(torch.arange(length, device=device), speed)
    return angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)


def _wan(stream: Stream, cos: Tensor, sin: Tensor) -> _Arithmetic:
    def call() -> tuple[Tensor, Tensor, Tensor]:
        made = []
        for x, weight in ((stream.q, stream.q_weight), (stream.k, stream.k_weight)):
            wide = x.flatten(2)
            normed = F.rms_norm(wide, wide.shape[-1:], weight, EPS)
            made.append(turned_in_place(normed.view(x.shape), cos, sin))
        return made[0], made[1], stream.v

    return call


def _joint(streams: list[Stream], cos: Tensor, sin: Tensor) -> _Arithmetic:
    """Angles of all streams, turned once joined; or of the first alone, turned before."""

    def call() -> tuple[Tensor, Tensor, Tensor]:
        whole = cos.shape[0] == sum(stream.q.shape[1] for stream in streams)
        made = []
        for name in ("q", "k"):
            parts = [
                F.rms_norm(getattr(s, name), (s.q.shape[-1],), getattr(s, f"{name}_weight"), EPS)
                for s in streams
            ]
            if not whole:
                parts[0] = turned(parts[0], cos, sin)
            joined = torch.cat(parts, 1)
            made.append(turned(joined, cos, sin) if whole else joined)
        return made[0], made[1], torch.cat([stream.v for stream in streams], 1)

    return call


def norm_rotary_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """As Wan has it, over all heads, where there is no text; by head and joined with text where
    there is, before an image and turned with it (FLUX), or after a clip (HunyuanVideo).
    """
    device = parts[0].device.type
    q, k, v = (x.transpose(1, 2).contiguous() for x in parts)
    video, depth = shape.tokens - shape.text, shape.head_dim
    image_first = shape.grid[0] > 1
    width = depth if shape.text else depth * shape.heads
    weights = [q.new_ones(width) for _ in range(2)]

    def stream(part: slice) -> Stream:
        # of their own, as projections of two streams are
        own = [x[:, part].clone() if shape.text else x for x in (q, k, v)]
        return Stream(own[0], own[1], own[2], weights[0], weights[1], EPS, EPS)

    streams = [stream(slice(0, video)), stream(slice(video, None))][: 1 + bool(shape.text)]
    if not image_first:
        streams.reverse()
    cos, sin = _angles(video if image_first else shape.tokens, depth, device)
    stock = _joint(streams, cos, sin) if shape.text else _wan(streams[0], cos, sin)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        return norm_rotary(
            streams, norm="head" if shape.text else "token", cos=cos[:, ::2], sin=sin[:, ::2]
        )

    copied = 3 if shape.text else 2
    least = 2 * copied * q.numel() * q.element_size() + (cos.numel() + sin.numel()) / 2 * 4
    yield Case("in one pass", ours, 0, least)
    yield Case("diffusers' arithmetic", stock, 0, least)
    if device == "cuda":
        yield Case("diffusers' arithmetic, compiled", torch.compile(stock), 0, least)


def block_summary_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """Of 64 keys and 128 queries a block."""
    q, k, v = parts
    blocked = Gilbert(64, 128)(q, k, v, Context(shape.context.geometry))
    keys, queries = blocked.keys, blocked.queries
    one = q.numel() * q.element_size()
    yield Case(
        "means of queries",
        lambda: block_mean(q, perm=queries.perm, offsets=queries.offsets, longest=queries.longest),
        0,
        one,
    )
    for name, var, cov in (
        ("means of keys and values", False, False),
        ("and variances", True, False),
        ("and covariances", False, True),
    ):

        def call(var: bool = var, cov: bool = cov) -> Any:
            return block_summary(
                k,
                v,
                perm=keys.perm,
                offsets=keys.offsets,
                num_video=keys.num_video,
                k_var=var,
                cov=cov,
                longest=keys.longest,
            )

        products = 2 * one / k.element_size() * shape.head_dim if cov else 0
        yield Case(name, call, products, 2 * one)


def check_norm_rotary(dtype: torch.dtype, depth: int, device: str) -> None:
    """At most twice the error of diffusers' arithmetic in this dtype."""
    p = Problem(dtype, depth, device, length=257)
    q, k, v = (3 * x.transpose(1, 2).contiguous() for x in (p.q, p.k, p.v))
    cos, sin = _angles(257, depth, device)
    for norm in ("head", "token"):
        width = depth if norm == "head" else 3 * depth
        weights = [(1 + p.noise(width) / 4).to(dtype) for _ in range(2)]
        whole = Stream(q, k, v, weights[0], weights[1], EPS, EPS)
        cases: list[tuple[list[Stream], int]] = [([whole], 257)]
        if norm == "head":
            halves = [
                Stream(q[:, part], k[:, part], v[:, part], weights[0], weights[1], EPS, EPS)
                for part in (slice(0, 100), slice(100, None))
            ]
            cases += [(halves, 257), (halves, 100)]
        for streams, rows in cases:
            got = norm_rotary(streams, norm=norm, cos=cos[:rows, ::2], sin=sin[:rows, ::2])
            low, exact = (
                (_joint if norm == "head" else _of_one)(
                    [_as(stream, kind) for stream in streams], cos[:rows], sin[:rows]
                )()
                for kind in (dtype, torch.float64)
            )
            for mine, theirs, wanted in zip(got[:2], low[:2], exact[:2], strict=True):
                bound = 2 * (theirs.double() - wanted).abs().max()
                worst = (mine.double() - wanted).abs().max()
                if not worst <= bound:
                    raise IncorrectError(
                        f"norm_rotary over each {norm}: expected an error of at most {bound:.2g}, "
                        f"got {worst:.2g}"
                    )
            if not torch.equal(got[2], v):
                raise IncorrectError("norm_rotary: expected values as they came")


def _of_one(streams: list[Stream], cos: Tensor, sin: Tensor) -> _Arithmetic:
    return _wan(streams[0], cos, sin)


def _as(stream: Stream, dtype: torch.dtype) -> Stream:
    names = ("q", "k", "v", "q_weight", "k_weight")
    return replace(stream, **{name: getattr(stream, name).to(dtype) for name in names})


def check_block_summary(dtype: torch.dtype, depth: int, device: str) -> None:
    """Twice the error of plain torch, and of rounding to this dtype what is multiplied."""
    p = Problem(dtype, depth, device)
    # the same tokens in blocks that fit a tile, and in those of the problem, which do not
    short = torch.arange(0, p.length + 64, 64, dtype=torch.int32, device=device)
    short = short.clamp(max=p.length).view(1, 1, -1)
    k = p.k + 2  # means far from zero, as those of keys are
    for offsets, longest in ((short, 64), (p.offsets, None)):
        for padded in (False, True):
            options: dict[str, Any] = {
                "perm": p.perm,
                "offsets": offsets,
                "num_video": offsets.shape[-1] - 3,
                "key_valid": p.valid if padded else None,
                "k_var": True,
                "cov": True,
            }
            keys, values = (p.holes(k), p.holes(p.v)) if padded else (k, p.v)
            got = block_summary(keys, values, longest=longest, **options)
            low = block_summary(keys, values, backend="batched", **options)
            exact = block_summary(keys.double(), values.double(), backend="batched", **options)
            for name in ("k_mean", "v_mean", "k_var", "cov_sum", "cov_norm"):
                mine, theirs, wanted = (getattr(x, name).double() for x in (got, low, exact))
                bound = 2 * (theirs - wanted).abs().max()
                bound += 2 * torch.finfo(dtype).eps * wanted.abs().max()
                worst = (mine - wanted).abs().max()
                if not worst <= bound:
                    raise IncorrectError(
                        f"block_summary: {name}: expected an error of at most {bound:.2g}, got "
                        f"{worst:.2g}"
                    )


MEMORY_CASES: dict[str, Callable[[Shape, tuple[Tensor, ...]], Iterator[Case]]] = {
    "norm_rotary": norm_rotary_cases,
    "block_summary": block_summary_cases,
}
MEMORY_CHECKS: dict[str, Callable[[torch.dtype, int, str], None]] = {
    "norm_rotary": check_norm_rotary,
    "block_summary": check_block_summary,
}
