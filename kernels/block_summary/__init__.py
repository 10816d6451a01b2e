"""Statistics of blocks of tokens."""

from dit_accel.kernels.block_summary.api import block_mean, block_summary

__all__ = ["block_mean", "block_summary"]
