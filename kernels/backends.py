"""Which implementation of an operation runs.

``reference`` goes head by head, for a CPU; ``batched`` takes many heads at once, for a GPU;
``triton`` is a kernel. An implementation that is asked for by name never falls back to another.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "batched", "triton")
"""Names that an operation may know."""
HEAD_SIZES = (64, 128)
"""Head sizes that the kernels are tuned for; any multiple of 16 up to 128 runs by name."""


def resolve(
    backend: str,
    like: Tensor,
    known: Sequence[str] = BACKENDS[:3],
    refusal: str | None = None,
    *,
    any_size: bool = False,
) -> str:
    """The implementation that a name means for a tensor.

    Args:
        backend: ``"auto"`` or the name of one.
        like: the tensor that the operation works on.
        known: names of the implementations that the operation has, ``"auto"`` among them.
        refusal: why the Triton kernel cannot take this call; ``None`` when it can.
        any_size: whether ``like`` has no head size last, which would have to be a tuned one.

    Raises:
        ValueError: there is none of this name, or it was named and cannot run.
    """
    if backend not in known:
        raise ValueError(f"backend: expected one of {', '.join(known)}, got {backend!r}")
    if backend == "triton" and refusal is not None:
        raise ValueError(f"backend: expected one that can run here, got 'triton': {refusal}")
    if backend != "auto":
        return backend
    if like.device.type == "cpu":
        return "reference"
    tuned = any_size or like.shape[-1] in HEAD_SIZES
    if "triton" in known and refusal is None and tuned:
        return "triton"
    return "batched" if "batched" in known else "reference"


def triton_refusal(like: Tensor) -> str | None:
    """Why no Triton kernel can take a tensor ``[..., D]``; ``None`` when one can."""
    if not _has_triton():
        return "triton is not installed"
    if like.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes fp16, bf16 and fp32, not {like.dtype}"
    depth = like.shape[-1]
    if depth % 16 or not 16 <= depth <= 128 or depth & (depth - 1):
        return f"it takes head sizes 16, 32, 64 and 128, not {depth}"
    if like.device.type == "cuda":
        return _too_old(like.device.index or 0)
    if not interpreted():
        return f"it runs on CUDA devices, not on {like.device.type}"
    if like.dtype == torch.bfloat16:
        return "Triton's interpreter computes bf16 products wrongly"
    return None


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ModuleNotFoundError:  # a finder that refuses it
        return False


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, as ``TRITON_INTERPRET=1`` makes it."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def is_hopper(device: torch.device) -> bool:
    """Whether a device is one of compute capability 9.0."""
    return device.type == "cuda" and capability(device) == (9, 0)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return _capability(device.index or 0)


@lru_cache(maxsize=8)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@lru_cache(maxsize=8)
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; of any other 1."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _too_old(index: int) -> str | None:
    capability = _capability(index)
    if capability < (8, 0):
        return f"it takes devices of compute capability 8.0 or newer, not {capability}"
    return None


@cache
def implementation(operation: str, name: str) -> ModuleType:
    """The module of an operation's implementation, imported when it is first used."""
    return importlib.import_module(f"dit_accel.kernels.{operation}.{name}")
