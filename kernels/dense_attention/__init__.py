"""Dense attention with a key mask, whole or as a partial."""

from dit_accel.kernels.dense_attention.api import (
    PARTIAL_BACKENDS,
    dense_attention,
    partial_attention,
)

__all__ = ["PARTIAL_BACKENDS", "dense_attention", "partial_attention"]
