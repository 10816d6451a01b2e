"""Attention where every query token has key blocks of its own choice."""

from dit_accel.kernels.token_attention.api import token_attention

__all__ = ["token_attention"]
