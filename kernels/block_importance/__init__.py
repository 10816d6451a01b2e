"""How much attention a block of queries pays to a block of keys, from samples of both."""

from dit_accel.kernels.block_importance.api import block_importance

__all__ = ["block_importance"]
