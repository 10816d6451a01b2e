"""Which key blocks every query token selects."""

from dit_accel.kernels.token_select.api import token_select

__all__ = ["token_select"]
