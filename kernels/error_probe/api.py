"""Guards and dispatch of the error probe."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.backends import implementation, resolve, triton_refusal
from dit_accel.kernels.block_summary.api import check_blocks, check_valid

MOST = 4096
"""Key blocks of a row that the kernel of plans holds at once."""


def error_probe(
    queries: Tensor,
    k: Tensor,
    log_weight: Tensor,
    *,
    perm: Tensor,
    offsets: Tensor,
    num_blocks: int,
    scale: float,
    key_valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``e_ij = Σ_{m∈K_j} |exp(s q_i·k_m) - w_ij|``, by the row's largest term.

    The probe of SVG-EAR (arXiv 2603.08982). Streamed: the logits ``Nq × L`` are never stored.

    Args:
        queries: ``[B, H, Nq, D]``, one for each row, fp32 (fp64).
        k: ``[B, H, L, D]``, floating.
        log_weight: ``[B, H, Nq, num_blocks]``, ``log w_ij``, the weight that each key of a block
            would get instead; ``-inf`` for none.
        perm, offsets: the key blocks, as in `block_summary`.
        num_blocks: of them, from the first.
        scale: of the logits.
        key_valid: bool ``[B, L]``; keys that count, all by default.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``; a named one never falls back.

    Returns:
        ``[B, H, Nq, num_blocks]`` in ``queries``' dtype. Every row is divided by its own largest
        exponential, so rows cannot be compared; zero for a block without a valid key.

    Raises:
        ValueError: what was given does not fit.
    """
    chosen = _checked(backend, queries, k, log_weight, perm, offsets, num_blocks, key_valid)
    run = implementation("error_probe", chosen).error_probe
    with torch.no_grad():
        error: Tensor = run(queries, k, log_weight, perm, offsets, num_blocks, scale, key_valid)
    return error


def error_plan(
    queries: Tensor,
    k: Tensor,
    log_weight: Tensor,
    *,
    perm: Tensor,
    offsets: Tensor,
    num_blocks: int,
    scale: float,
    density: float,
    all_rows: int,
    key_valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The blocks whose stand-in would be furthest off, for what they cost: SVG-EAR's plan.

    Every row takes blocks by falling ``e_ij / n_j`` while their ``n_j`` keys fit its budget, and at
    least one; of equal ones the first. A block without a valid key is never taken.

    Args:
        queries, k, log_weight, perm, offsets, num_blocks, scale, key_valid: as of `error_probe`.
        density: share of the valid keys of these blocks that a row may take.
        all_rows: of the plan, ``Nq`` or more; those beyond, and blocks beyond ``num_blocks``, are
            exact.
        backend: as of `error_probe`.

    Returns:
        int8 ``[B, H, all_rows, Nk]``, all key blocks: 1 exact, -1 left to the rest.

    Raises:
        ValueError: what was given does not fit.
    """
    chosen = _checked(backend, queries, k, log_weight, perm, offsets, num_blocks, key_valid)
    if all_rows < queries.shape[2]:
        raise ValueError(f"all_rows: expected {queries.shape[2]} or more, got {all_rows}")
    if chosen == "triton" and offsets.shape[-1] - 1 > MOST:
        if backend == "triton":
            raise ValueError(
                f"backend: expected one that can run here, got 'triton': it takes up to {MOST} key "
                f"blocks, not {offsets.shape[-1] - 1}"
            )
        chosen = "reference"
    run = implementation("error_probe", chosen).error_plan
    with torch.no_grad():
        code: Tensor = run(
            queries,
            k,
            log_weight,
            perm,
            offsets,
            num_blocks,
            scale,
            key_valid,
            density,
            all_rows,
        )
    return code


def _checked(
    backend: str,
    queries: Tensor,
    k: Tensor,
    log_weight: Tensor,
    perm: Tensor,
    offsets: Tensor,
    num_blocks: int,
    key_valid: Tensor | None,
) -> str:
    """The implementation that a name means, once everything fits."""
    if queries.ndim != 4 or queries.shape[:2] != k.shape[:2] or queries.shape[3] != k.shape[3]:
        raise ValueError(
            f"queries: expected [{k.shape[0]}, {k.shape[1]}, Nq, {k.shape[3]}], got "
            f"{list(queries.shape)}"
        )
    expected = (*queries.shape[:3], num_blocks)
    if tuple(log_weight.shape) != expected:
        raise ValueError(f"log_weight: expected {list(expected)}, got {list(log_weight.shape)}")
    check_blocks("k", perm, offsets, k)
    check_valid(key_valid, k)
    refusal = triton_refusal(k)
    if queries.dtype == torch.float64:
        refusal = "it takes queries of fp32, not fp64"
    return resolve(backend, k, ("auto", "reference", "triton"), refusal)
