"""Dense attention with a key mask."""

from dit_accel.kernels.dense_attention.api import dense_attention

__all__ = ["dense_attention"]
