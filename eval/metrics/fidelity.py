"""How near a clip is to the dense one of the same seed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from dit_accel.errors import InputError

_WINDOW = 11
_ALEXNET = "alexnet-owt-7be5be79.pth"


def psnr(frames: Tensor, dense: Tensor) -> float:
    """Peak signal-to-noise ratio over all frames together, in dB; infinite for equal clips.

    Args:
        frames, dense: ``[T, 3, H, W]`` in [0, 1].

    Raises:
        InputError: the clips differ in shape.
    """
    _check(frames, dense)
    return float(peak_signal_noise_ratio(frames, dense, data_range=1.0))


def psnr_by_frame(frames: Tensor, dense: Tensor) -> list[float]:
    """`psnr` of every frame."""
    _check(frames, dense)
    return [psnr(one, other) for one, other in zip(frames.split(1), dense.split(1), strict=True)]


def ssim(frames: Tensor, dense: Tensor) -> float:
    """Structural similarity, mean over the frames; 1 for equal clips. Arguments as in `psnr`."""
    each = ssim_by_frame(frames, dense)
    return sum(each) / len(each)


def ssim_by_frame(frames: Tensor, dense: Tensor) -> list[float]:
    """Structural similarity of every frame (Wang et al. 2004: Gaussian windows, sigma 1.5).

    Over the windows that lie within the frame, as there; torchmetrics by itself also counts those
    that reach beyond its border.
    """
    _check(frames, dense)
    if min(frames.shape[-2:]) < _WINDOW:
        raise InputError(
            f"frames: expected at least {_WINDOW}x{_WINDOW} pixels, got {list(frames.shape[-2:])}"
        )
    found = structural_similarity_index_measure(
        frames, dense, data_range=1.0, reduction="none", return_full_image=True
    )
    assert isinstance(found, tuple)
    edge = _WINDOW // 2
    inside = found[1][..., edge:-edge, edge:-edge]
    return [float(one) for one in inside.flatten(1).mean(1)]


def latent_error(latents: Tensor, dense: Tensor) -> float:
    """Relative L2: ``‖x - y‖ / ‖y‖`` over all elements, in fp64; both of one shape.

    Raises:
        InputError: they differ in shape.
    """
    if latents.shape != dense.shape:
        raise InputError(
            f"latents: expected one shape, got {list(latents.shape)} and {list(dense.shape)}"
        )
    difference = float((latents.double() - dense.double()).norm())
    size = float(dense.double().norm())
    return difference / size if size else (math.inf if difference else 0.0)


def lpips() -> Callable[[Tensor, Tensor], list[float]] | str:
    """LPIPS of every frame on AlexNet, arguments as in `psnr`; or why it cannot be had.

    Nothing is downloaded: the backbone's weights must lie in torch's hub folder already.
    """
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    if not (Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET).is_file():
        return f"torchvision's AlexNet weights ({_ALEXNET}) are not in torch's hub folder"
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    # as a module the network is loaded once
    net = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)

    @torch.inference_mode()
    def measure(frames: Tensor, dense: Tensor) -> list[float]:
        _check(frames, dense)
        each = [
            float(net(one, other))
            for one, other in zip(frames.split(1), dense.split(1), strict=True)
        ]
        net.reset()
        return each

    return measure


def _check(frames: Tensor, dense: Tensor) -> None:
    if frames.shape != dense.shape or frames.ndim != 4:
        raise InputError(
            f"frames: expected two clips [T, 3, H, W] of one shape, got {list(frames.shape)} and "
            f"{list(dense.shape)}"
        )
