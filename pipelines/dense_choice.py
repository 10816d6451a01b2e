"""Whether a processor leaves a call to dense attention since that is faster here."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

from dit_accel.crossover import Choice, Chooser
from dit_accel.types import Context


def head_dim_of(attn: Any, hidden_states: Tensor) -> int:
    """The head size of an attention module, which says how wide it is, or is as wide as tokens."""
    width: int = getattr(attn, "inner_dim", None) or hidden_states.shape[-1]
    return width // int(attn.heads)


def choice_of(
    processor: Any, ctx: Context, like: Tensor, heads: int, head_dim: int
) -> Choice | None:
    """See `dit_accel.crossover.choose`; what was found is kept with the processor.

    Args:
        processor: a `MethodProcessor`.
        ctx: the call.
        like: ``[B, ...]``, of its dtype and device.
        heads, head_dim: of one element of the batch.
    """
    known: Chooser | None = vars(processor).get("_chooser")
    if known is None or known.method is not processor.method:
        known = processor._chooser = Chooser(processor.method)
    torchs = processor._attention_backend in (None, AttentionBackendName.NATIVE)
    return known(ctx, like, like.shape[0] * heads, head_dim, "sdpa" if torchs else "best")
