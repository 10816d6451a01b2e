"""Dense attention with a key mask."""

from dit_accel.kernels.dense_attention.api import dense_attention
from dit_accel.kernels.dense_attention.backends import BACKENDS, why_not

__all__ = ["BACKENDS", "dense_attention", "why_not"]
