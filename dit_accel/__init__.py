"""Diffusion transformers made faster by sparse attention, without retraining.

>>> import torch, dit_accel
>>> q, k, v = torch.randn(3, 1, 2, 96, 16)
>>> out = dit_accel.attention(q, k, v, dit_accel.presets.pisa(block_size=16), grid=(4, 4, 6))
>>> out.shape
torch.Size([1, 2, 96, 16])
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a clone the parts of this package lie beside it. Python started there finds this folder first,
# whatever is installed, and must find the parts as well.
_clone = Path(__file__).parents[1]
if (_clone / "kernels").is_dir() and (_clone / "pyproject.toml").is_file():
    __path__.append(str(_clone))

from dit_accel import presets
from dit_accel.errors import InputError
from dit_accel.functional import attention
from dit_accel.method import Method, Schedule
from dit_accel.partial import Partial, merge
from dit_accel.state import State
from dit_accel.types import Context, Geometry, Prefix, Report

if TYPE_CHECKING:
    from dit_accel.pipelines import accelerate, restore

try:
    __version__ = version("dit_accel")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Context",
    "Geometry",
    "InputError",
    "Method",
    "Partial",
    "Prefix",
    "Report",
    "Schedule",
    "State",
    "__version__",
    "accelerate",
    "attention",
    "merge",
    "presets",
    "restore",
]

# what needs diffusers is imported on first use
_LAZY = {"accelerate": "dit_accel.pipelines", "restore": "dit_accel.pipelines"}
_LAZY_MODULES = ("pipelines", "eval")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return import_module(f"dit_accel.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
