"""Guards and dispatch of the count of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.backends import implementation, interpreted, resolve
from dit_accel.kernels.words import Words

KNOWN = ("auto", "reference", "triton")


def pair_count(
    code: Tensor | Words, keys: Tensor, queries: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Pairs of a query and a key in the blocks that are exact.

    Args:
        code: ``[B|1, H|1, N, Nk]``; int8, where 1 is exact, or bool, or as much in `Words`.
        keys: integer ``[B|1, H|1, Nk]``, keys of each block, below 2**31 in all.
        queries: integer ``[B|1, H|1, N]``, queries of each row; one, if not given, and with
            `Words`.
        backend: ``"auto"``, or one of `KNOWN`; a named one never falls back.

    Returns:
        int64 ``[B, H]``, the leading dimensions broadcast.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    stored = code.word if isinstance(code, Words) else code
    if isinstance(code, Words):
        if queries is not None:
            raise ValueError("queries: expected none with words, of which each is one query's")
    elif code.ndim != 4 or code.dtype not in (torch.int8, torch.bool):
        raise ValueError(
            f"code: expected int8 or bool [B|1, H|1, N, Nk], got {code.dtype} {list(code.shape)}"
        )
    for name, x, length in (("keys", keys, code.shape[3]), ("queries", queries, code.shape[2])):
        if x is not None and (x.ndim != 3 or x.shape[2] != length or x.is_floating_point()):
            raise ValueError(
                f"{name}: expected integers [B|1, H|1, {length}], got {x.dtype} {list(x.shape)}"
            )
    chosen = resolve(backend, stored, KNOWN, _refusal(stored), any_size=True)
    found: Tensor = implementation("pair_count", chosen).pair_count(code, keys, queries)
    return found


def _refusal(code: Tensor) -> str | None:
    if code.device.type != "cuda" and not interpreted():
        return f"it runs on CUDA devices, not on {code.device.type}"
    return None
