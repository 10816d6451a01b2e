"""The largest entries of every row."""

from dit_accel.kernels.topk.api import topk_mask

__all__ = ["topk_mask"]
