"""Who computes dense attention, and why somebody cannot.

Only ``sdpa`` is given a mask. The others compute over the valid keys alone, gathered, which is the
same attention and lets kernels without masks serve padded text.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.kernels.dense_attention import flash3, xformers_ops

BACKENDS: Final = ("sdpa", "cudnn", "flash", "flash3", "xformers")
"""torch's own choice, torch's cuDNN, torch's FlashAttention, FlashAttention-3, and xformers."""

_TORCH: Final[dict[str, tuple[SDPBackend, Callable[[Any, bool], bool]]]] = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention),
    "flash": (SDPBackend.FLASH_ATTENTION, can_use_flash_attention),
}


def why_not(
    backend: str, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None
) -> str | None:
    """The reason why a backend cannot run here, or cannot run these tensors; ``None`` if it can.

    Args:
        backend: a name from `BACKENDS`.
        q, k, v: ``[B, H, L, D]``, all or none. Without them only what is installed, and whether
            there is a GPU, can be known. A key mask is no reason for any of them.

    Raises:
        ValueError: there is no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected {' or '.join(BACKENDS)}, got {backend!r}")
    if backend == "sdpa":
        return None
    if backend == "xformers":
        return xformers_ops.why_not(q, k, v)
    if backend == "flash3":
        return flash3.why_not(q, k, v)
    on_cpu = not torch.cuda.is_available() if q is None else q.device.type == "cpu"
    if on_cpu:
        # torch has FlashAttention for CPUs too, for any dtype and head size
        if backend == "flash":
            return None
        if q is not None and torch.cuda.is_available():
            return f"needs tensors on a CUDA device, got {q.device}"
        return "needs a CUDA device, and there is none"
    if q is None or k is None or v is None or torch.compiler.is_compiling():
        return None
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes tensors of dtype fp16 or bf16, got {q.dtype}"
    kind, can_use = _TORCH[backend]
    given = SDPAParams(q, k, v, None, 0.0, False, False)
    with sdpa_kernel([kind]):
        if can_use(given, False):
            return None
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            can_use(given, True)
    reasons = [" ".join(str(one.message).partition("(Triggered")[0].split()) for one in told]
    return "; ".join(filter(None, reasons)) or "torch cannot run it on these tensors"


def attend(
    backend: str, q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, scale: float | None
) -> Tensor:
    """``softmax(scale · q kᵀ) v`` over the valid keys, by a backend that can run this."""
    if backend == "sdpa":
        return _sdpa(q, k, v, key_valid, scale)
    others = {"xformers": xformers_ops.attention, "flash3": flash3.attention}
    run = others.get(backend) or _forced(backend)
    if key_valid is None:
        return run(q, k, v, scale)
    count, after = torch.stack([key_valid.sum(-1), _after_last(key_valid)]).tolist()
    if min(count) == k.shape[2]:
        return run(q, k, v, scale)
    out = torch.zeros_like(q)
    for b, (valid, stop) in enumerate(zip(count, after, strict=True)):
        if valid == 0:
            continue
        some = slice(b, b + 1)
        keys, values = k[some, :, :stop], v[some, :, :stop]
        if valid < stop:
            chosen = key_valid[b].nonzero().squeeze(-1)
            keys, values = (x[some].index_select(2, chosen) for x in (k, v))
        out[some] = run(q[some], keys, values, scale)
    return out


def _after_last(key_valid: Tensor) -> Tensor:
    """int64 ``[B]``: the position after the last valid key."""
    place = torch.arange(1, key_valid.shape[1] + 1, device=key_valid.device)
    return (place * key_valid).amax(-1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, scale: float | None) -> Tensor:
    if key_valid is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    mask = key_valid[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return torch.where(mask.any(-1, keepdim=True), out, torch.zeros((), dtype=out.dtype))


def _forced(backend: str) -> Callable[[Tensor, Tensor, Tensor, float | None], Tensor]:
    kind, _ = _TORCH[backend]

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        with sdpa_kernel([kind]):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)

    return run
