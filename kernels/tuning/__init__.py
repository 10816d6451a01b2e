"""How kernels are launched: sizes of tiles, warps and stages, by device and shape."""

from dit_accel.kernels.tuning.lookup import overridden, setting
from dit_accel.kernels.tuning.spaces import SPACES, Setting, Space

__all__ = ["SPACES", "Setting", "Space", "overridden", "setting"]
