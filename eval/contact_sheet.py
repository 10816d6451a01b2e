"""Frames of several clips on one picture, a row a prompt and a column of frames a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dit_accel.errors import InputError

_MARGIN, _GAP, _LINE = 12, 2, 20
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


def contact_sheet(
    clips: Mapping[str, Sequence[Tensor]], captions: Sequence[str], frames: int = 5
) -> Image.Image:
    """Lay clips out side by side.

    Args:
        clips: by method, one for each caption, each ``[T, 3, H, W]`` in [0, 1], all of one size.
        captions: one above every row.
        frames: taken from each clip, evenly from the first to the last.

    Raises:
        InputError: there is no clip, the numbers differ, or the sizes do.
    """
    if not clips or not captions:
        raise InputError("contact sheet: expected at least one clip, got none")
    for name, row in clips.items():
        if len(row) != len(captions):
            raise InputError(
                f"contact sheet: expected {len(captions)} clips of {name}, got {len(row)}"
            )
    shapes = {tuple(clip.shape) for row in clips.values() for clip in row}
    if len(shapes) != 1:
        raise InputError(f"contact sheet: expected clips of one size, got {sorted(shapes)}")
    length, _, height, width = shapes.pop()
    picked = torch.linspace(0, length - 1, min(frames, length)).round().long()
    strip = len(picked) * (width + _GAP) - _GAP
    font = ImageFont.load_default(14)
    size = (
        _MARGIN + len(clips) * (strip + _MARGIN),
        _MARGIN + _LINE + len(captions) * (height + _LINE + _MARGIN),
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (name, row) in enumerate(clips.items()):
        left = _MARGIN + column * (strip + _MARGIN)
        draw.text((left, _MARGIN), name, _INK, font)
        for line, clip in enumerate(row):
            top = _MARGIN + _LINE + line * (height + _LINE + _MARGIN)
            if column == 0:
                draw.text((left, top), captions[line], _INK, font)
            for i, frame in enumerate(clip[picked]):
                pixels = (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
                sheet.paste(Image.fromarray(pixels), (left + i * (width + _GAP), top + _LINE))
    return sheet
