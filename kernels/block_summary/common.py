"""What the kernels of the block statistics share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.backends import capability
from dit_accel.kernels.order import lead_strides
from dit_accel.kernels.packed import Compact
from dit_accel.kernels.specimen import Specimen, typed

SIZES = ["heads", "blocks", "num_video", "perm_b", "perm_h", "offset_b", "offset_h"]
"""Names of numbers that no kernel is compiled for."""


def room_for(k: Tensor, blocks: int, *wanted: str) -> dict[str, Tensor]:
    """Means and variances that are wanted, empty."""
    shape = (*k.shape[:2], blocks, k.shape[3])
    return {name: torch.empty(shape, dtype=torch.float32, device=k.device) for name in wanted}


def strides_of(k: Tensor, v: Tensor, order: Compact) -> tuple[int, ...]:
    """Strides that all kernels take."""
    return (
        *(*k.stride()[:3], *v.stride()[:3]),
        *(*lead_strides(order.perm), *lead_strides(order.offsets)),
    )


def capability_of(device: torch.device) -> tuple[int, int]:
    """Of a GPU; in the interpreter that of Hopper."""
    return capability(device) if device.type == "cuda" else (9, 0)


def specimen(kernel: Any, name: str, dtype: str, constants: dict[str, Any]) -> Specimen:
    """A kernel as it is launched with these constants and options."""
    options: dict[str, Any] = {}
    for option in ("num_warps", "num_stages"):
        if option in constants:
            options[option] = constants.pop(option)
    names = ("k_mean", "v_mean", "k_var", "cov_norm", "cov_part", "cov_sum")
    types = {
        **dict.fromkeys(("k", "v"), f"*{dtype}"),
        **dict.fromkeys(("perm", "offsets"), "*i32"),
        **dict.fromkeys((*names, "sums"), "*fp32"),
    }
    signature = typed(kernel, constants, **types)
    strides = tuple(n for n in ("k_b", "k_h", "k_l", "v_b", "v_h", "v_l") if n in signature)
    return Specimen(f"{name} {dtype}", kernel, signature, constants, options, aligned=strides)
