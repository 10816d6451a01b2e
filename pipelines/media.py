"""Clips and images on disk, and images read from there. Written whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from dit_accel.atomic import replace_with as replace_with
from dit_accel.atomic import write_text as write_text
from dit_accel.errors import InputError

KINDS = (".mp4", ".gif", "a folder of png (no suffix)")


def kind_of(path: Path) -> str:
    """``mp4``, ``gif`` or ``png``, by the name.

    Raises:
        InputError: it is none of them.
    """
    suffix = path.suffix.lower()
    if suffix in (".mp4", ".gif"):
        return suffix[1:]
    if suffix == "":
        return "png"
    raise InputError(f"out: expected {', '.join(KINDS)}, got {path.name!r}")


def check_image_name(path: Path) -> None:
    """Raise an InputError unless an image may have this name, which must end in ``.png``."""
    if path.suffix.lower() != ".png":
        raise InputError(f"out: expected a name that ends in .png for an image, got {path.name!r}")


def read_image(path: Path) -> Image.Image:
    """A picture in RGB, upright as its camera says.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        what = getattr(error, "strerror", None) or "it cannot be read as one"
        raise InputError(f"image: expected a picture, got {str(path)!r}: {what}") from error


def check_writable(path: Path, *, force: bool) -> None:
    """Raise an InputError unless a file or folder can be put there.

    Args:
        path: of the output.
        force: whether something that is there may be replaced.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"out: expected an existing folder, got {str(parent)!r}")
    if path.exists() and not force:
        raise InputError(f"out: expected a new name (or --force), got {str(path)!r}, which exists")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(
            f"out: expected a folder that can be written to, got {str(parent)!r}: {error.strerror}"
        ) from error


def write_clip(frames: Tensor, path: Path, fps: int) -> None:
    """Write a clip; what was there is replaced only by a whole one.

    Args:
        frames: ``[T, 3, H, W]`` in [0, 1].
        path: its name says the kind; see `kind_of`.
        fps: frames per second; a folder of png has none.

    Raises:
        InputError: the kind is unknown, or the frames are no clip.
    """
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise InputError(f"frames: expected [T, 3, H, W], got {list(frames.shape)}")
    kind = kind_of(path)
    pixels = _pixels(frames)
    writers: dict[str, Callable[[np.ndarray, Path, int], None]] = {
        "mp4": _write_mp4,
        "gif": _write_gif,
        "png": _write_png,
    }
    replace_with(path, lambda part: writers[kind](pixels, part, fps))


def write_image(frames: Tensor, path: Path) -> None:
    """Write an image as png; what was there is replaced only by a whole one.

    Args:
        frames: ``[1, 3, H, W]`` in [0, 1].
        path: ends in ``.png``.

    Raises:
        InputError: the name or the shape is another.
    """
    check_image_name(path)
    if frames.ndim != 4 or tuple(frames.shape[:2]) != (1, 3):
        raise InputError(f"image: expected [1, 3, H, W], got {list(frames.shape)}")
    pixels = _pixels(frames)[0]
    replace_with(path, lambda part: imageio.imwrite(part, pixels, format="PNG"))


def _pixels(frames: Tensor) -> np.ndarray:
    """uint8 ``[T, H, W, 3]`` of ``[T, 3, H, W]`` in [0, 1]."""
    made: np.ndarray = (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return made


def _write_mp4(pixels: np.ndarray, path: Path, fps: int) -> None:
    # quality 9 keeps small shapes sharp; yuv420p plays everywhere, and wants even sizes
    height, width = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    writer: Any = imageio.get_writer(
        path, format="FFMPEG", fps=fps, codec="libx264", quality=9, macro_block_size=1
    )
    with writer:
        for frame in pixels:
            writer.append_data(frame)


def _write_gif(pixels: np.ndarray, path: Path, fps: int) -> None:
    imageio.mimsave(path, list(pixels), format="GIF", duration=1000 / fps, loop=0)


def _write_png(pixels: np.ndarray, path: Path, fps: int) -> None:
    path.mkdir()
    for i, frame in enumerate(pixels):
        imageio.imwrite(path / f"{i:04d}.png", frame)
