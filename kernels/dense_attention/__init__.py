"""Dense attention with a key mask, and over some of the keys."""

from dit_accel.kernels.dense_attention.api import dense_attention, dense_partial

__all__ = ["dense_attention", "dense_partial"]
