"""A small network for clips of the embedded domain, trained by us to tell what they show.

It looks at eight frames of 64×64, and was trained on procedural clips to name colour, shape,
motion, background and texture (`dit_accel.eval.features.train`). Its features are the layer below
these answers. It measures distances within this domain, and says nothing about any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_accel.errors import InputError
from dit_accel.pipelines.tiny_wan import scenes

FRAMES: Final = 8
SIZE: Final = 64
FEATURES: Final = 64
HEADS: Final = {
    "colour": tuple(scenes.COLOURS),
    "shape": scenes.SHAPES,
    "motion": tuple(scenes.MOTIONS),
    "background": tuple(scenes.BACKGROUNDS),
    "texture": scenes.TEXTURES,
}
"""What the network is asked, and the possible answers."""
KIND: Final = "dit_accel clip features 1"
WEIGHTS: Final = Path(__file__).with_name("weights.safetensors")


class ClipNet(nn.Module):
    """Clips to features: convolutions over time and space, mean and maximum, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 16, 32, 64, 96), ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
        self.layers = nn.ModuleList(
            nn.Conv3d(a, b, 3, stride, padding=1)
            for a, b, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.out = nn.Linear(2 * widths[-1], FEATURES)
        self.centre: Tensor
        self.spread: Tensor
        self.register_buffer("centre", torch.zeros(FEATURES))
        self.register_buffer("spread", torch.ones(FEATURES))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(answers)) for name, answers in HEADS.items()}
        )

    def forward(self, clips: Tensor) -> Tensor:
        """Features ``[N, 64]`` of clips ``[N, 3, 8, 64, 64]`` in [-1, 1]."""
        x = clips
        for conv, norm in zip(self.layers, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        # a shape is small: its mean over the clip says little
        return self.out(torch.cat([x.mean((2, 3, 4)), x.amax((2, 3, 4))], 1))

    def standard(self, features: Tensor) -> Tensor:
        """Features with mean 0 and deviation 1 on procedural clips: KID depends on their scale."""
        return (features - self.centre) / self.spread

    def answers(self, features: Tensor) -> dict[str, Tensor]:
        """Logits by question, ``[N, answers]`` each."""
        return {name: head(F.silu(features)) for name, head in self.heads.items()}


def picked(length: int) -> Tensor:
    """Indices of the frames that are looked at, evenly from the first to the last."""
    return torch.linspace(0, length - 1, FRAMES).round().long()


def prepared(frames: Tensor) -> Tensor:
    """``[1, 3, 8, 64, 64]`` in [-1, 1] of a clip ``[T, 3, H, W]`` in [0, 1]."""
    chosen = frames[picked(frames.shape[0])]
    small = F.interpolate(chosen, (SIZE, SIZE), mode="bilinear", antialias=True)
    return (small * 2 - 1).transpose(0, 1).unsqueeze(0)


def save(network: ClipNet, path: Path) -> None:
    """Write the weights in half precision."""
    state = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(state, path, metadata={"kind": KIND})


def load(path: Path = WEIGHTS) -> ClipNet:
    """The network with its weights, in fp32.

    Raises:
        InputError: the file is not there, or holds another network.
    """
    try:
        with safe_open(path, "pt") as file:
            kind = (file.metadata() or {}).get("kind")
        if kind != KIND:
            raise InputError(
                f"features: expected weights of {KIND!r} in {str(path)!r}, got {kind!r}"
            )
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"features: expected safetensors in {str(path)!r}: {error}") from None
    network = ClipNet()
    network.load_state_dict({name: value.float() for name, value in state.items()})
    return network.eval()
