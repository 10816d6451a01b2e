"""Norms and rotary embedding in one pass, in place of the modules that a transformer has for them.

The kernel takes the place of modules only where it computes what they do: ``torch.nn.RMSNorm`` and
diffusers' ``RMSNorm`` themselves, without a bias, without hooks, with weights where the activations
are. Everything else, and everything on a CPU, runs the modules and diffusers' arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from dit_accel.errors import InputError
from dit_accel.projections import Over, Stream, norm_rotary, why_not_kernel

CHOICES: Final = ("auto", "triton", "diffusers")
"""Who computes norms and rotary embedding; ``"auto"`` is the kernel on a GPU that it is for."""
DIFFUSERS: Final = "diffusers"
Angles = tuple[Tensor, Tensor]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_choice(choice: str) -> str:
    """``choice``, if it is one.

    Raises:
        InputError: it is none.
    """
    if choice not in CHOICES:
        raise InputError(f"norm_rotary: expected {' | '.join(CHOICES)}, got {choice!r}")
    return choice


class Projected(NamedTuple):
    """Projections of a stream, ``[B, L, H, D]`` each, and the norms of its queries and keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: Any
    norm_k: Any

    @classmethod
    def of(cls, projections: Iterable[Tensor], norm_q: Any, norm_k: Any) -> Projected:
        """Of queries, keys and values."""
        q, k, v = projections
        return cls(q, k, v, norm_q, norm_k)


class Task(NamedTuple):
    """A call of the kernel."""

    streams: tuple[Stream, ...]
    over: Over | None
    angles: Angles | None
    dtype: torch.dtype

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """``q``, ``k`` and ``v``, ``[B, L, H, D]`` with the tokens of all streams."""
        cos, sin = (None, None) if self.angles is None else self.angles
        return norm_rotary(
            self.streams, norm=self.over, cos=cos, sin=sin, dtype=self.dtype, backend="triton"
        )


def task_of(
    choice: str,
    parts: Sequence[Projected],
    over: Over,
    angles: Angles | str | None,
    dtype: torch.dtype | None = None,
) -> Task | str:
    """What the kernel is to do in place of the modules, or why it is to do nothing.

    Args:
        choice: of `CHOICES`.
        parts: of every stream, in the order of the sequence.
        over: what the norms are over: each head's channels, or all channels of a token.
        angles: cosines and sines ``[R, D / 2]`` of the first streams' tokens; ``None`` for none;
            or why they cannot be had.
        dtype: that queries and keys are cast to; what the norms return by default.
    """
    if choice == DIFFUSERS:
        return DIFFUSERS
    like = parts[0].q
    found = _streams(parts, over)
    reason = found if isinstance(found, str) else _unfit(parts, angles)
    if reason is None and not isinstance(found, str):
        streams, normed = found
        over_what = None if normed is None else over
        reason = _refused(
            choice, str(like.device), like.dtype, like.shape[-2], like.shape[-1], over_what
        )
        if reason is None and not isinstance(angles, str):
            return Task(streams, over_what, angles, dtype or normed or like.dtype)
    assert reason is not None
    return reason


def angles_of_channels(cos: Tensor, sin: Tensor, like: Tensor) -> Angles | str:
    """Angles of channel pairs from those of every channel, ``[L, D]``, where pairs are alike."""
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[1] != like.shape[-1]:
        return f"angles are {list(cos.shape)} and {list(sin.shape)}"
    return cos[:, ::2], sin[:, ::2]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _refused(
    choice: str, device: str, dtype: torch.dtype, heads: int, depth: int, over: Over | None
) -> str | None:
    """Why the kernel does not take projections of this kind; a constant where graphs are traced."""
    return why_not_kernel(device, dtype, heads, depth, over, named=choice == "triton")


def _streams(
    parts: Sequence[Projected], over: Over
) -> tuple[tuple[Stream, ...], torch.dtype | None] | str:
    """Streams of the kernel, and the dtype that the norms return; ``None`` without norms."""
    streams: list[Stream] = []
    dtypes: set[torch.dtype | None] = set()
    for part in parts:
        of_q, of_k = _norm(part.norm_q, part.q, over), _norm(part.norm_k, part.k, over)
        if isinstance(of_q, str):
            return of_q
        if isinstance(of_k, str):
            return of_k
        (q_weight, q_eps, q_dtype), (k_weight, k_eps, k_dtype) = of_q, of_k
        if (q_weight is None) != (k_weight is None):
            return "only one of two norms has a weight"
        dtypes |= {q_dtype, k_dtype}
        streams.append(Stream(part.q, part.k, part.v, q_weight, k_weight, q_eps, k_eps))
    if len(dtypes) > 1:
        return "norms differ in what they return"
    return tuple(streams), dtypes.pop()


def _norm(
    norm: Any, x: Tensor, over: Over
) -> tuple[Tensor | None, float, torch.dtype | None] | str:
    """Weight, eps and resulting dtype of a norm that the kernel can stand in for, or why not."""
    if norm is None:
        return None, 0.0, None
    if type(norm) not in (nn.RMSNorm, RMSNorm):
        return f"a norm is a {type(norm).__name__}"
    if norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__:
        return "a norm has hooks"
    if getattr(norm, "bias", None) is not None:
        return "a norm has a bias"
    width = x.shape[-1] if over == "head" else x.shape[-2] * x.shape[-1]
    weight, eps = norm.weight, norm.eps
    shape = norm.normalized_shape if type(norm) is nn.RMSNorm else norm.dim
    if tuple(shape) != (width,):
        return f"a norm is over {list(shape)} channels, not over {width}"
    if eps is None:
        return "a norm leaves its eps to the dtype"
    dtype = x.dtype
    if weight is not None:
        if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in _FLOATS:
            return f"a norm's weight is a {type(weight).__name__} of {weight.dtype}"
        if weight.device != x.device:
            return f"a norm is on {weight.device}, and its input on {x.device}"
        if type(norm) is RMSNorm:
            # diffusers casts down to a weight's dtype before, and up by multiplying
            dtype = weight.dtype
    return weight, float(eps), dtype


def _unfit(parts: Sequence[Projected], angles: Angles | str | None) -> str | None:
    """Why tensors are none of the kernel's, whatever the norms are."""
    if isinstance(angles, str):
        return angles
    like = parts[0].q
    every = [x for part in parts for x in part[:3]]
    if any(type(x) is not Tensor for x in every):
        return "projections are no plain tensors"
    if any(x.dtype != like.dtype for x in every):
        return "projections are of several dtypes"
    if torch.is_grad_enabled() and any(x.requires_grad for x in every):
        return "gradients are asked for"
    if angles is None:
        return None
    if any(x.device != like.device for x in angles):
        return f"angles are on {angles[0].device}, and projections on {like.device}"
    ends, end = [], 0
    for part in parts:
        end += part.q.shape[1]
        ends.append(end)
    if angles[0].shape[0] not in ends:
        return f"angles are of {angles[0].shape[0]} tokens, and streams end at {ends}"
    return None
