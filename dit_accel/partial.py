"""Softmax attention over a subset of the keys, as a value that can be merged.

For logits ``x_m`` over a subset ``S`` of the keys, the partial is ``out = Σ_S softmax(x)_m v_m``
and ``lse = log Σ_S exp(x_m)``. Merging partials over disjoint subsets is exact attention over the
union (the online softmax: Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv
2205.14135).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.kernels.merge import merge as merge_two


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype logits, statistics and normalisers are kept in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention over a subset of the keys.

    Attributes:
        out: ``[B, H, L, D]``, any floating dtype.
        lse: ``[B, H, L]``, fp32 (fp64 beside an fp64 ``out``), natural log of the normaliser. A row
            over the empty subset is ``(0, -inf)``.
    """

    out: Tensor
    lse: Tensor

    def __post_init__(self) -> None:
        if self.out.shape[:-1] != self.lse.shape:
            raise InputError(
                f"partial: expected out [B, H, L, D] with lse [B, H, L], got "
                f"{list(self.out.shape)} with {list(self.lse.shape)}"
            )

    @classmethod
    def empty_like(cls, query: Tensor) -> Partial:
        """The partial over no key at all, for queries ``[B, H, L, D]``: the identity of `merge`."""
        lse = query.new_full(
            query.shape[:-1], -torch.inf, dtype=accumulate_dtype(query.dtype), requires_grad=False
        )
        return cls(torch.zeros_like(query), lse)


def merge(*partials: Partial) -> Partial:
    """Merge partials over disjoint subsets of the keys into the partial over their union.

    Associative and commutative up to rounding; ``merge(x, empty)`` is ``x`` to the last bit, and
    rows that are empty on both sides stay ``(0, -inf)``, with no NaN.

    Args:
        partials: one or more partials of one shape.

    Returns:
        The merged partial; ``out`` in the widest dtype of the parts' ``out``.

    Raises:
        InputError: no partial was given, or the shapes disagree.

    Example:
        >>> a = Partial(torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2))
        >>> b = Partial(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2))
        >>> merge(a, b).out.unique().item()
        0.5
    """
    if not partials:
        raise InputError("merge: expected at least one partial, got none")
    shapes = {tuple(part.out.shape) for part in partials}
    if len(shapes) > 1:
        raise InputError(f"merge: expected partials of one shape, got {sorted(shapes)}")
    if len(partials) == 1:
        return partials[0]

    dtype = reduce(torch.promote_types, (part.out.dtype for part in partials))
    work = reduce(
        torch.promote_types, (part.lse.dtype for part in partials), accumulate_dtype(dtype)
    )
    parts = ((part.out.to(dtype), part.lse.to(work)) for part in partials)
    return Partial(*reduce(lambda one, other: merge_two(*one, *other), parts))
