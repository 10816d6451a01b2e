"""Guards and dispatch of the selection by gates."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.backends import implementation, resolve, triton_refusal
from dit_accel.kernels.words import Words


def token_select(
    q: Tensor,
    k_mean: Tensor,
    own: Tensor,
    full: Tensor,
    *,
    num_video: int,
    text_span: tuple[int, int],
    threshold: float,
    scope: Literal["head", "token"] = "head",
    mode: Literal["threshold", "topk"] = "threshold",
    backend: str = "auto",
) -> Words:
    """The blocks with the largest gates ``g_nj = q_n·k̄_j``, as VMoBA selects (arXiv 2506.23858).

    Gates are min-max normalised over a head's pairs. A token's own block is always selected, and
    counts; then the best others are taken until the threshold is reached.

    Args:
        q: ``[B, H, L, D]``, floating.
        k_mean: ``[B, H, Nk, D]``, fp32 (fp64), mean keys of the blocks.
        own: int64 ``[B|1, H|1, L]``, the block that each token is in.
        full: bool ``[B|1, H|1, Nk]``; blocks without a key are selected by nobody but their own.
        num_video: blocks, the first ones, that are selected; the others are for everybody.
        text_span: ``(start, stop)`` of the tokens that select everything.
        threshold: above 0, below 1: the share of all the normalised gate (``mode="threshold"``) or
            of the number of pairs (``"topk"``) that must be reached.
        scope: among all pairs of a head, or for every token by itself.
        mode: by the sum of the gates, or by their number.
        backend: ``"auto"``, ``"reference"``, or ``"triton"``, which takes ``scope="head"`` and
            compares gates in 24 bits; a named one never falls back.

    Returns:
        ``[B, H, L, Nk]`` as `Words`. Among equal gates the first token's and the first block's win.

    Raises:
        ValueError: what was given does not fit.
    """
    batch, heads, length, depth = q.shape
    blocks = k_mean.shape[2]
    if tuple(k_mean.shape) != (batch, heads, blocks, depth):
        raise ValueError(
            f"k_mean: expected [{batch}, {heads}, Nk, {depth}], got {list(k_mean.shape)}"
        )
    for name, tensor, kind, size in (
        ("own", own, torch.int64, length),
        ("full", full, torch.bool, blocks),
    ):
        if (
            tensor.dtype != kind
            or tensor.ndim != 3
            or tensor.shape[0] not in (1, batch)
            or tensor.shape[1] not in (1, heads)
            or tensor.shape[2] != size
        ):
            raise ValueError(
                f"{name}: expected {kind} [{batch}|1, {heads}|1, {size}], got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    if not 0 <= num_video <= blocks:
        raise ValueError(f"num_video: expected 0 to {blocks}, got {num_video}")
    refusal = triton_refusal(q)
    if scope != "head":
        refusal = "it selects among all pairs of a head, and not for every token by itself"
    elif k_mean.dtype == torch.float64:
        refusal = "it takes mean keys of fp32, not fp64"
    chosen = resolve(backend, q, ("auto", "reference", "triton"), refusal)
    run = implementation("token_select", chosen).token_select
    with torch.no_grad():
        select: Words = run(q, k_mean, own, full, num_video, text_span, threshold, scope, mode)
    return select
