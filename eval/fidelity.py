"""How near a clip is to the dense one of the same seed."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from dit_accel.errors import InputError


def psnr(frames: Tensor, dense: Tensor) -> float:
    """Peak signal-to-noise ratio over all frames together, in dB; infinite for equal clips.

    Args:
        frames, dense: ``[T, 3, H, W]`` in [0, 1].

    Raises:
        InputError: the clips differ in shape.
    """
    _check(frames, dense)
    return float(peak_signal_noise_ratio(frames, dense, data_range=1.0))


def ssim(frames: Tensor, dense: Tensor) -> float:
    """Structural similarity, mean over the frames; 1 for equal clips. Arguments as in `psnr`."""
    _check(frames, dense)
    value = structural_similarity_index_measure(frames, dense, data_range=1.0)
    assert isinstance(value, Tensor)
    return float(value)


def _check(frames: Tensor, dense: Tensor) -> None:
    if frames.shape != dense.shape or frames.ndim != 4:
        raise InputError(
            f"frames: expected two clips [T, 3, H, W] of one shape, got {list(frames.shape)} and "
            f"{list(dense.shape)}"
        )
