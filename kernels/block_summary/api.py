"""Guards and dispatch of the block statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.backends import BACKENDS, implementation, resolve, triton_refusal


@dataclass(frozen=True, slots=True)
class BlockSummary:
    """Statistics of key blocks; see `block_summary`. What was not asked for is ``None``."""

    count: Tensor
    k_mean: Tensor
    v_mean: Tensor
    k_var: Tensor | None
    cov_sum: Tensor | None
    cov_norm: Tensor | None


def check_blocks(name: str, perm: Tensor, offsets: Tensor, like: Tensor) -> None:
    """Raise a ValueError unless ``perm`` and ``offsets`` can cut the tokens of ``like``."""
    batch, heads, length = like.shape[:3]
    for label, tensor in ((f"{name}_perm", perm), (f"{name}_offsets", offsets)):
        if (
            tensor.ndim != 3
            or tensor.shape[0] not in (1, batch)
            or tensor.shape[1] not in (1, heads)
        ):
            raise ValueError(
                f"{label}: expected [{batch}|1, {heads}|1, ...], got {list(tensor.shape)}"
            )
        if tensor.device != like.device:
            raise ValueError(f"{label}: expected device {like.device}, got {tensor.device}")
    if perm.dtype != torch.int64 or perm.shape[-1] != length:
        raise ValueError(
            f"{name}_perm: expected int64 of {length} tokens, got {perm.dtype} {list(perm.shape)}"
        )
    if offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}_offsets: expected int32, got {offsets.dtype}")


def check_valid(key_valid: Tensor | None, like: Tensor) -> None:
    """Raise a ValueError unless ``key_valid`` is bool ``[B, L]``, or ``None``."""
    if key_valid is not None and (
        key_valid.dtype != torch.bool or tuple(key_valid.shape) != (like.shape[0], like.shape[2])
    ):
        raise ValueError(
            f"key_valid: expected bool [{like.shape[0]}, {like.shape[2]}], got "
            f"{key_valid.dtype} {list(key_valid.shape)}"
        )


def block_mean(
    x: Tensor,
    *,
    perm: Tensor,
    offsets: Tensor,
    valid: Tensor | None = None,
    longest: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean of every block's tokens.

    Args:
        x: ``[B, H, L, D]``, floating.
        perm: int64 ``[B|1, H|1, L]``.
        offsets: int32 ``[B|1, H|1, N + 1]``.
        valid: bool ``[B, L]``; tokens to count, all by default.
        longest: tokens of the longest block, where the caller knows; never less.
        backend: ``"auto"``, or a name from `backends.BACKENDS`; a named one never falls back.

    Returns:
        ``[B, H, N, D]``, fp32 (fp64 for fp64 inputs); zero where a block is empty.
    """
    check_blocks("x", perm, offsets, x)
    check_valid(valid, x)
    chosen = resolve(backend, x, BACKENDS, triton_refusal(x))
    run = implementation("block_summary", chosen).block_mean
    known = {"longest": longest} if chosen == "triton" else {}
    mean: Tensor = run(x, perm, offsets, valid, **known)
    return mean


def block_summary(
    k: Tensor,
    v: Tensor,
    *,
    perm: Tensor,
    offsets: Tensor,
    num_video: int,
    key_valid: Tensor | None = None,
    k_var: bool = False,
    cov: bool = False,
    longest: int | None = None,
    backend: str = "auto",
) -> BlockSummary:
    """Means, counts and, if asked for, variances and covariances of every key block.

    ``C_j = Σ_{n∈K_j} (k_n - k̄_j) v_nᵀ`` (PISA, arXiv 2602.01077) is never kept for all blocks:
    only its sum over the first ``num_video`` blocks, and its Frobenius norms.

    Args:
        k, v: ``[B, H, L, D]``, floating.
        perm, offsets: the key blocks, as in `block_mean`.
        num_video: how many blocks, the first ones, ``cov_sum`` sums over.
        key_valid: bool ``[B, L]``; keys that count, all by default.
        k_var: compute ``k_var``.
        cov: compute ``cov_sum`` and ``cov_norm``.
        longest: tokens of the longest block, where the caller knows; never less.
        backend: ``"auto"``, or a name from `backends.BACKENDS`; a named one never falls back.

    Returns:
        ``count`` int64 ``[B|1, H|1, N]``; ``k_mean``, ``v_mean``, ``k_var`` ``[B, H, N, D]``;
        ``cov_sum`` ``[B, H, D, D]`` (keys by values); ``cov_norm`` ``[B, H, N]``. Floats are fp32
        (fp64 for fp64 inputs). Everything is zero where a block has no valid key.
    """
    if k.shape != v.shape:
        raise ValueError(f"k, v: expected one shape, got {list(k.shape)} and {list(v.shape)}")
    check_blocks("k", perm, offsets, k)
    check_valid(key_valid, k)
    chosen = resolve(backend, k, BACKENDS, triton_refusal(k))
    run = implementation("block_summary", chosen).block_summary
    known = {"longest": longest} if chosen == "triton" else {}
    found: BlockSummary = run(k, v, perm, offsets, num_video, key_valid, k_var, cov, **known)
    return found
