"""Real clips, which a distribution is held against."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.eval.prompts import scene_of
from dit_accel.eval.samples import Settings
from dit_accel.pipelines.tiny_wan import scenes

_VIDEOS = (".mp4", ".gif", ".webm", ".mov", ".avi", ".mkv")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PER_PROMPT = 8
"""Procedural clips drawn for every prompt."""


def procedural(settings: Settings, seed: int = 0) -> list[Tensor]:
    """Clips that the embedded domain's own generator draws of the prompts' scenes.

    Returns:
        Clips ``[T, 3, H, W]`` in [0, 1], `PER_PROMPT` for each prompt that is a caption of a scene.
    """
    found = []
    for prompt in settings.prompts:
        scene = scene_of(prompt.text)
        if scene is None:
            continue
        rngs = [random.Random(f"real/{seed}/{prompt.number}/{i}") for i in range(PER_PROMPT)]
        staged = scenes.stage([scene] * PER_PROMPT, rngs, settings.frames)
        drawn = scenes.render(staged, settings.height, settings.width)
        found += list(((drawn + 1) / 2).clamp(0, 1).transpose(1, 2))
    return found


def from_folder(folder: Path, settings: Settings) -> Iterator[Tensor]:
    """Clips and images of a folder, in the order of their names.

    Each is cropped about its centre and scaled to the run's size. Of a clip as many frames as the
    run's are taken, from the start; an image is a clip of one frame.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"real: expected a folder of videos or images, got {str(folder)!r}")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (*_VIDEOS, *_IMAGES))
    if not paths:
        raise InputError(f"real: expected videos or images in {str(folder)!r}, got none")
    for path in paths:
        try:
            frames = list(_frames(path, settings.frames))
        except (OSError, ValueError) as error:
            raise InputError(f"real: expected to read {str(path)!r}, got {error}") from None
        yield _fitted(torch.from_numpy(np.stack(frames)), settings.height, settings.width)


def _frames(path: Path, most: int) -> Iterator[Any]:
    if path.suffix.lower() in _IMAGES:
        yield np.asarray(Image.open(path).convert("RGB"))
        return
    reader: Any = imageio.get_reader(path)
    with reader:
        for i, frame in enumerate(reader):
            if i == most:
                return
            yield np.asarray(frame)[..., :3]


def _fitted(pixels: Tensor, height: int, width: int) -> Tensor:
    """``[T, 3, height, width]`` in [0, 1] of ``[T, h, w, 3]`` in 8 bits."""
    frames = pixels.permute(0, 3, 1, 2).float() / 255
    h, w = frames.shape[-2:]
    scale = max(height / h, width / w)
    size = (max(height, round(h * scale)), max(width, round(w * scale)))
    frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[..., top : top + height, left : left + width].clamp(0, 1)
