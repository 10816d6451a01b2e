"""A plan of the best key blocks of every row, by the product of block means."""

from dit_accel.kernels.pooled_topk.api import pooled_topk, share_of

__all__ = ["pooled_topk", "share_of"]
