"""Clips on disk: mp4, gif or a folder of png. Written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from torch import Tensor

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


def write_image(frame: Tensor, path: Path) -> None:
    """Write an image as png, whole or not at all.

    Args:
        frame: ``[3, H, W]`` in [0, 1].
    """
    pixels = _pixels(frame.unsqueeze(0))[0]
    replace_with(path, lambda part: imageio.imwrite(part, pixels, format="PNG"))


def _pixels(frames: Tensor) -> np.ndarray:
    """uint8 ``[T, H, W, 3]`` of frames ``[T, 3, H, W]`` in [0, 1]."""
    made: np.ndarray = (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return made


def replace_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file or folder under a temporary name, and move it to ``path``.

    Raises:
        Exception: whatever ``write`` raises; what was at ``path`` is then as before.
    """
    path = path.absolute()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as room:
        part = Path(room) / path.name
        write(part)
        if path.is_dir() or (path.exists() and part.is_dir()):
            old = Path(room) / "replaced"
            path.rename(old)
        os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8")

    replace_with(path, write)


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
