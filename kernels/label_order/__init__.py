"""Tokens sorted by the cluster that each belongs to."""

from dit_accel.kernels.label_order.api import label_order

__all__ = ["label_order"]
