"""Dense attention by FlashAttention-3, whole or as a partial. It is imported when it is used.

Either of two packages brings it: `flash_attn_interface`, as FlashAttention's own repository builds
it, or ``fa3-fwd``, wheels of its forward pass alone, in bf16.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

MODULES: Final = ("flash_attn_interface", "fa3_fwd_interface")
"""The first that is installed is used."""


def installed() -> str | None:
    """The module that brings it, if any does."""
    return next((name for name in MODULES if find_spec(name) is not None), None)


def why_not(q: Tensor | None, k: Tensor | None, v: Tensor | None) -> str | None:
    """The reason why it cannot run here, or on these tensors ``[B, H, L, D]``."""
    name = installed()
    if name is None:
        return "FlashAttention-3 is not installed: pip install fa3-fwd"
    if not torch.cuda.is_available():
        return "needs a CUDA device, and there is none"
    if q is not None and q.device.type != "cuda":
        return f"needs tensors on a CUDA device, got {q.device}"
    where = torch.cuda.current_device() if q is None else q.device
    capability = torch.cuda.get_device_capability(where)
    if capability != (9, 0):
        return f"needs a device of compute capability 9.0, got {'.'.join(map(str, capability))}"
    if q is None:
        return None
    dtypes = (torch.bfloat16,) if name == "fa3_fwd_interface" else (torch.float16, torch.bfloat16)
    if q.dtype not in dtypes:
        takes = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"takes tensors of dtype {takes}, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"takes heads of a multiple of 8 up to 256, got {q.shape[-1]}"
    return None


def refuses(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None) -> str | None:
    """The reason why no partial can be had from it, or ``None``. Reads no values."""
    return "it takes no key mask" if key_valid is not None else why_not(q, k, v)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Softmax attention ``[B, H, Lq, D]``."""
    return _run(q, k, v, scale)[0]


@torch.no_grad()
def partial_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `dit_accel.kernels.dense_attention.partial_attention`; no row may be empty."""
    return _run(q, k, v, scale)


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    name = installed()
    assert name is not None
    module: Any = import_module(name)
    by_token = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = module.flash_attn_func(*by_token, softmax_scale=scale, return_attn_probs=True)
    return out.transpose(1, 2), lse
