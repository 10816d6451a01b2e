"""Two partial attentions into one."""

from dit_accel.kernels.merge.api import merge

__all__ = ["merge"]
