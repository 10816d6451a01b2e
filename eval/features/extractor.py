"""The choice of a feature network: ours, Inception, or somebody's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.eval.features import network
from dit_accel.pipelines import embedded

_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True, slots=True)
class Extractor:
    """A feature network.

    Attributes:
        name: for records.
        of: ``clip`` or ``frame``: what one feature vector is of.
        features: ``[n, D]`` fp32 of a clip ``[T, 3, H, W]`` in [0, 1]; one row for a clip, or a row
            for every frame.
    """

    name: str
    of: str
    features: Callable[[Tensor], Tensor]


def extractor_of(choice: str, model: str) -> Extractor | str:
    """The network that a name or path means, or why it cannot be had.

    Args:
        choice: ``auto`` (ours for an embedded model, otherwise ``inception``), ``embedded``,
            ``inception`` (torchmetrics' own, when torch-fidelity and its weights are there), or a
            path: safetensors of `dit_accel.eval.features.network.ClipNet`, or TorchScript that
            takes frames ``[N, 3, H, W]`` in [0, 1] and gives ``[N, D]``.
        model: whose clips are looked at.

    Raises:
        InputError: a path is none of these.
    """
    if choice == "auto":
        choice = "embedded" if embedded.find(model) else "inception"
    if choice == "embedded":
        if embedded.find(model) is None:
            return (
                f"the embedded features know the clips of {', '.join(embedded.names())} alone, "
                f"not of {model}"
            )
        return _ours(network.WEIGHTS, "embedded")
    if choice == "inception":
        return _inception()
    path = Path(choice).expanduser()
    if not path.is_file():
        raise InputError(f"features: expected auto, embedded, inception or a file, got {choice!r}")
    return _ours(path, choice) if path.suffix == ".safetensors" else _script(path)


def _ours(path: Path, name: str) -> Extractor:
    net = network.load(path)

    @torch.inference_mode()
    def features(frames: Tensor) -> Tensor:
        return net.standard(net(network.prepared(frames.float()))).clone()

    return Extractor(name, "clip", features)


def _script(path: Path) -> Extractor:
    try:
        script: Any = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"features: expected TorchScript in {str(path)!r}, got {str(error).splitlines()[0]}"
        ) from None
    script.eval()

    @torch.inference_mode()
    def features(frames: Tensor) -> Tensor:
        made = script(frames.float())
        if not isinstance(made, Tensor) or made.ndim != 2 or len(made) != len(frames):
            shape = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise InputError(f"features: expected [{len(frames)}, D] from {path.name}, got {shape}")
        return made.float().clone()

    return Extractor(str(path), "frame", features)


def _inception() -> Extractor | str:
    if importlib.util.find_spec("torch_fidelity") is None:
        return "torch-fidelity, which has the Inception network, is not installed"
    if not (Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION).is_file():
        return f"the weights of Inception ({_INCEPTION}) are not in torch's hub folder"
    from torchmetrics.image.fid import NoTrainInceptionV3

    net = NoTrainInceptionV3("inception-v3-compat", ["2048"])

    @torch.inference_mode()
    def features(frames: Tensor) -> Tensor:
        pixels = (frames.clamp(0, 1) * 255).round().byte()
        return torch.cat([net(part).float() for part in pixels.split(16)]).clone()

    return Extractor("inception", "frame", features)
