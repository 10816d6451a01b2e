"""Guards and dispatch of block importance."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.backends import implementation, resolve, triton_refusal


def block_importance(
    q: Tensor,
    k: Tensor,
    *,
    q_tokens: Tensor,
    q_bounds: Tensor,
    k_tokens: Tensor,
    k_bounds: Tensor,
    scale: float,
    k_longest: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """``Σ_{n∈i} Σ_{m∈j} softmax_m(s q_n·k_m)`` for every pair of blocks of sampled tokens.

    The importance that PSA routes by (arXiv 2512.04025). The softmax goes over all sampled keys.

    Args:
        q, k: ``[B, H, L, D]``, floating.
        q_tokens, k_tokens: int64 ``[B|1, H|1, M]``, the sampled tokens, block by block. They may be
            longer than the blocks; what lies behind the last block must be tokens but is not used.
        q_bounds, k_bounds: int32 ``[B|1, H|1, N + 1]``, from 0, where the samples are cut into
            blocks. Empty blocks are allowed.
        scale: of the logits.
        k_longest: samples of the longest block of keys, where the caller knows; never less.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``; a named one never falls back.

    Returns:
        ``[B, H, Nq, Nk]``, fp32 (fp64 for fp64 inputs). A row adds up to its sampled queries; zero
        where there is no sampled key.

    Raises:
        ValueError: what was given does not fit.
    """
    if q.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k: expected [B, H, L, D] of equal B, H and D, got {list(q.shape)} and "
            f"{list(k.shape)}"
        )
    for name, tensor, kind in (
        ("q_tokens", q_tokens, torch.int64),
        ("k_tokens", k_tokens, torch.int64),
        ("q_bounds", q_bounds, torch.int32),
        ("k_bounds", k_bounds, torch.int32),
    ):
        if (
            tensor.dtype != kind
            or tensor.ndim != 3
            or tensor.shape[0] not in (1, q.shape[0])
            or tensor.shape[1] not in (1, q.shape[1])
        ):
            raise ValueError(
                f"{name}: expected {kind} [{q.shape[0]}|1, {q.shape[1]}|1, ...], got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
    chosen = resolve(backend, q, ("auto", "reference", "triton"), triton_refusal(q))
    run = implementation("block_importance", chosen).block_importance
    with torch.no_grad():
        importance: Tensor = run(q, k, q_tokens, q_bounds, k_tokens, k_bounds, scale, k_longest)
    return importance
