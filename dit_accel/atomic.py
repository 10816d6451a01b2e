"""`dit_accel.kernels.atomic` for what imports no kernels."""

from dit_accel.kernels.atomic import replace_with, write_text

__all__ = ["replace_with", "write_text"]
