"""Attention over blocks: some pairs exactly, a stand-in for the rest, under one softmax."""

from dit_accel.kernels.block_attention.api import RestTerms, block_attention

__all__ = ["RestTerms", "block_attention"]
