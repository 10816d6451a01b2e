"""The plug: diffusers pipelines whose self-attention runs a sparse method.

>>> from diffusers import WanPipeline  # doctest: +SKIP
>>> pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")  # doctest: +SKIP
>>> dit_accel.accelerate(pipe, "pisa", density=0.15)  # doctest: +SKIP

Everything is imported on first use, so that ``import dit_accel.pipelines`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.pipelines import embedded
    from dit_accel.pipelines.loading import load
    from dit_accel.pipelines.plug import accelerate, processor, restore, session_of

__all__ = ["accelerate", "embedded", "load", "processor", "restore", "session_of"]

_LAZY = {
    "accelerate": "plug",
    "processor": "plug",
    "restore": "plug",
    "session_of": "plug",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    if name == "embedded":
        return import_module(f"{__name__}.embedded")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
