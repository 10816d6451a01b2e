"""Pictures inside the page: posters of clips, and maps of attention."""

from __future__ import annotations

import base64
import io
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_accel.eval.attention_maps import KINDS, Maps

POSTER: Final = 224
"""Pixels along the longer side of a poster, at most."""
LARGEST: Final = 192
"""Blocks along one side of a map, at most; larger ones are averaged."""
PALETTE: Final = (
    (226, 224, 217),  # dropped
    (31, 60, 92),  # exact
    (92, 128, 163),  # exact for some queries
    (88, 140, 126),  # averaged by 2
    (132, 178, 163),  # averaged by 4
    (184, 213, 202),  # averaged by 8
    (233, 196, 123),  # approximated
    (201, 140, 167),  # cached
)
"""Colours of `KINDS`."""
DECADES: Final = 3
"""Powers of ten that the scale of errors spans."""


def poster(frame: Tensor) -> str:
    """A frame ``[3, H, W]`` in [0, 1] as a JPEG inside an address."""
    pixels = (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(pixels)
    image.thumbnail((POSTER, POSTER))
    return _address(image, "JPEG", quality=80)


def kinds_picture(made: Maps, head: int) -> str:
    """What became of the pairs of a head, a block a pixel, queries down and keys across."""
    kind = _thinned(made.kind[head])
    image = Image.fromarray(kind.numpy(), mode="P")
    image.putpalette([value for colour in PALETTE for value in colour])
    return _address(image, "PNG", optimize=True)


def errors_picture(made: Maps, head: int, largest: float) -> str:
    """The error each pair left, on a logarithmic scale, and the rows' own errors at the right.

    Args:
        made, head: which.
        largest: top of the scale.
    """
    error = _shrunk(made.error[head].float())
    row = _shrunk(made.row[head].float().unsqueeze(1).expand(-1, made.kind.shape[2]))[:, :1]
    wide = max(2, error.shape[1] // 24)
    gap = torch.full((error.shape[0], max(1, wide // 2)), -1.0)
    scaled = torch.cat([_scaled(error, largest), gap, _scaled(row, largest).expand(-1, wide)], 1)
    level = (scaled.clamp(0, 1) * 252).round().byte()
    level[scaled < 0] = 255
    image = Image.fromarray(level.numpy(), mode="P")
    ramp = [value for i in range(253) for value in ramp_colour(i / 252)]
    image.putpalette([*ramp, *(255, 255, 255) * 3])
    image.info["transparency"] = 255
    return _address(image, "PNG", optimize=True, transparency=255)


def ramp_colour(share: float) -> tuple[int, int, int]:
    """Of an error: pale to dark red by way of orange."""
    stops = np.array([(247, 244, 237), (240, 196, 140), (206, 92, 60), (92, 16, 36)], dtype=float)
    place = share * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    mixed = stops[i] + (place - i) * (stops[i + 1] - stops[i])
    return tuple(round(value) for value in mixed.tolist())  # type: ignore[return-value]


def shares(made: Maps, head: int) -> list[dict[str, object]]:
    """Of every kind that occurs: its share of the pairs, and their mean error."""
    kind, error = made.kind[head], made.error[head].float()
    found: list[dict[str, object]] = []
    for index, name in enumerate(KINDS):
        these = kind == index
        if not bool(these.any()):
            continue
        found.append(
            {
                "kind": name,
                "share": float(these.float().mean()),
                "error": float(error[these].square().mean().sqrt()),
            }
        )
    return found


def top_of(maps: list[Maps]) -> float:
    """Top of a scale that all these errors share."""
    return max(1e-6, *(float(part.max()) for one in maps for part in (one.error, one.row)))


def _scaled(error: Tensor, largest: float) -> Tensor:
    # what lies below the scale is its lowest colour
    return (1 + (error.clamp(min=1e-12) / largest).log10() / DECADES).clamp(min=0)


def _thinned(kind: Tensor) -> Tensor:
    """At most `LARGEST` along each side, by taking evenly spaced pairs: kinds have no mean."""
    picks = [torch.linspace(0, size - 1, min(size, LARGEST)).round().long() for size in kind.shape]
    return kind[picks[0]][:, picks[1]].contiguous()


def _shrunk(x: Tensor) -> Tensor:
    size = (min(x.shape[0], LARGEST), min(x.shape[1], LARGEST))
    if size == tuple(x.shape):
        return x
    return torch.nn.functional.adaptive_avg_pool2d(x[None, None], size)[0, 0]


def _address(image: Image.Image, kind: str, **how: object) -> str:
    room = io.BytesIO()
    image.save(room, kind, **how)  # type: ignore[arg-type]
    text = base64.b64encode(room.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{text}"
