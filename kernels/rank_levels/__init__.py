"""How far down its row's ranking an entry stands."""

from dit_accel.kernels.rank_levels.api import rank_levels

__all__ = ["rank_levels"]
