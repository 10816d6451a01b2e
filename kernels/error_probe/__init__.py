"""What a stand-in for a block would cost, seen from a query."""

from dit_accel.kernels.error_probe.api import error_probe

__all__ = ["error_probe"]
