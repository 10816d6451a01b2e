"""Guards and dispatch of the merge."""

from __future__ import annotations

from torch import Tensor

from dit_accel.kernels.backends import implementation, resolve, triton_refusal

KNOWN = ("auto", "reference", "triton")


def merge(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from attention over each of them.

    The online softmax (Milakov and Gimelshein, arXiv 1805.02867). Rows that are empty on both sides
    stay ``(0, -inf)``; a row that is empty on one side is the other to the last bit.

    Args:
        out, other: ``[B, H, L, D]``, one floating dtype.
        lse, other_lse: ``[B, H, L]``, natural log of the normaliser, fp32 (fp64); ``-inf`` for
            none.
        backend: ``"auto"``, or one of `KNOWN`; a named one never falls back.

    Returns:
        ``out`` ``[B, H, L, D]`` and ``lse`` ``[B, H, L]``, in the inputs' dtypes.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if out.shape != other.shape or lse.shape != other_lse.shape or out.shape[:-1] != lse.shape:
        raise ValueError(
            f"merge: expected out [B, H, L, D] with lse [B, H, L] twice, got {list(out.shape)} "
            f"with {list(lse.shape)}, {list(other.shape)} with {list(other_lse.shape)}"
        )
    if out.dtype != other.dtype or lse.dtype != other_lse.dtype:
        raise ValueError(
            f"merge: expected one dtype for each pair, got {out.dtype} and {other.dtype}, "
            f"{lse.dtype} and {other_lse.dtype}"
        )
    chosen = resolve(backend, out, KNOWN, triton_refusal(out))
    run = implementation("merge", chosen).merge
    result: tuple[Tensor, Tensor] = run(out, lse, other, other_lse)
    return result
