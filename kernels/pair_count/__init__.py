"""How many pairs of tokens a plan computes exactly."""

from dit_accel.kernels.pair_count.api import pair_count

__all__ = ["pair_count"]
