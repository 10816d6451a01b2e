"""Dense attention with a key mask, whole or as a partial."""

from dit_accel.kernels.dense_attention.api import (
    PARTIAL_BACKENDS,
    dense_attention,
    partial_attention,
)
from dit_accel.kernels.dense_attention.backends import BACKENDS, why_not

__all__ = ["BACKENDS", "PARTIAL_BACKENDS", "dense_attention", "partial_attention", "why_not"]
