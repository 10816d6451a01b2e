"""What a stand-in for a block would cost, seen from a query, and a plan that goes by it."""

from dit_accel.kernels.error_probe.api import error_plan, error_probe
from dit_accel.kernels.error_probe.choice import choose_within

__all__ = ["choose_within", "error_plan", "error_probe"]
