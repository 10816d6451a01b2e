"""Guards and dispatch of norms and rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.backends import implementation, resolve, triton_refusal

KNOWN = ("auto", "reference", "triton")
MOST_CHANNELS = 2**14
"""Channels that the kernel norms together: a token's are held in registers."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Projections of some tokens that share norms, such as those of the text.

    Attributes:
        q, k, v: ``[B, L, H, D]``, one floating dtype, any strides.
        q_weight, k_weight: of the norms, ``[D]`` or, across heads, ``[H * D]``; both or none.
        q_eps, k_eps: of the norms.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    q_eps: float = 1e-6
    k_eps: float = 1e-6


def norm_rotary(
    streams: Sequence[Stream],
    *,
    norm: str | None = "head",
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    dtype: torch.dtype | None = None,
    order: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms and rotates queries and keys, and puts streams one after the other.

    A channel becomes ``x w / sqrt(mean(x²) + eps)`` (RMSNorm, arXiv 1910.07467), and then a pair of
    channels ``(2i, 2i + 1)`` of a token is turned by its angle (RoFormer, arXiv 2104.09864), all in
    fp32 (fp64 for fp64) and rounded once.

    Args:
        streams: at least one; all of one batch, heads, dtype and device.
        norm: ``"head"``, over each head's channels; ``"token"``, over all channels of a token;
            ``None`` for none.
        cos, sin: floating ``[R, D / 2]``, any strides, of the first ``R`` tokens; the others are
            not turned. ``R`` counts whole streams. ``None`` turns none.
        dtype: of the queries and keys that are returned; as they came by default.
        order: int32 ``[L]``, the tokens in the order in which they are to be written, for a single
            stream.
        backend: ``"auto"``, or one of `KNOWN`; a named one never falls back.

    Returns:
        ``q``, ``k`` and ``v``, ``[B, L, H, D]`` with all streams' tokens. A single stream's ``v``
        is returned as it is, unless there is an order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if not streams:
        raise ValueError("streams: expected at least one, got none")
    first = streams[0].q
    for number, stream in enumerate(streams):
        _check_stream(f"streams[{number}]", stream, first, norm)
    if norm not in ("head", "token", None):
        raise ValueError(f"norm: expected 'head', 'token' or None, got {norm!r}")
    lengths = [stream.q.shape[1] for stream in streams]
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or none, got one")
    if cos is not None and sin is not None:
        _check_angles(cos, sin, lengths, first)
    if order is not None:
        if len(streams) > 1:
            raise ValueError(f"order: expected a single stream, got {len(streams)}")
        if order.dtype != torch.int32 or tuple(order.shape) != (lengths[0],):
            raise ValueError(
                f"order: expected int32 [{lengths[0]}], got {order.dtype} {list(order.shape)}"
            )
    chosen = resolve(backend, first, KNOWN, refusal(first, norm))
    run = implementation("norm_rotary", chosen).norm_rotary
    result: tuple[Tensor, Tensor, Tensor] = run(
        streams, norm, cos, sin, first.dtype if dtype is None else dtype, order
    )
    return result


def refusal(like: Tensor, norm: str | None) -> str | None:
    """Why the kernel cannot take projections ``[B, L, H, D]``; ``None`` when it can."""
    channels = like.shape[-2] * like.shape[-1]
    if norm == "token" and channels > MOST_CHANNELS:
        return f"it norms at most {MOST_CHANNELS} channels together, not {channels}"
    return triton_refusal(like)


def _check_stream(name: str, stream: Stream, like: Tensor, norm: str | None) -> None:
    q, k, v = stream.q, stream.k, stream.v
    shape = (like.shape[0], q.shape[1], *like.shape[2:]) if q.ndim == 4 else None
    if like.ndim != 4 or any(tuple(x.shape) != shape for x in (q, k, v)):
        raise ValueError(
            f"{name}: expected q, k and v of one shape [B, L, H, D], got {list(q.shape)}, "
            f"{list(k.shape)}, {list(v.shape)}"
        )
    for what in ("dtype", "device"):
        found = [getattr(x, what) for x in (q, k, v)]
        if any(one != getattr(like, what) for one in found):
            raise ValueError(f"{name}: expected one {what} of all, got {found}")
    if not like.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {like.dtype}")
    if (stream.q_weight is None) != (stream.k_weight is None):
        raise ValueError(f"{name}: expected weights for q and k or for none, got one")
    width = like.shape[3] if norm == "head" else like.shape[2] * like.shape[3]
    for weight in (stream.q_weight, stream.k_weight):
        if weight is not None and (norm is None or tuple(weight.shape) != (width,)):
            raise ValueError(
                f"{name}: expected weights [{width}] of a norm, got {list(weight.shape)} with norm "
                f"{norm!r}"
            )
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad and not x.is_leaf for x in (q, k, v)
    ):
        raise ValueError(f"{name}: expected no gradient to be asked for: run under torch.no_grad()")


def _check_angles(cos: Tensor, sin: Tensor, lengths: list[int], like: Tensor) -> None:
    half = like.shape[3] // 2
    if like.shape[3] % 2:
        raise ValueError(f"cos, sin: expected pairs of channels, got {like.shape[3]} channels")
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[1] != half:
        raise ValueError(
            f"cos, sin: expected [R, {half}] each, got {list(cos.shape)} and {list(sin.shape)}"
        )
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    if cos.shape[0] not in ends:
        raise ValueError(
            f"cos, sin: expected angles of whole streams, which end at {ends}, got {cos.shape[0]}"
        )
    if cos.device != like.device or sin.device != like.device:
        raise ValueError(
            f"cos, sin: expected device {like.device}, got {cos.device} and {sin.device}"
        )
