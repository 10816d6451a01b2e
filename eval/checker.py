"""An analytic judge of the embedded domain: what a clip shows, read off its pixels.

Nothing is learnt. The background is what the clip's border shows, the foreground what differs from
it; colour is the nearest of the palette, motion comes from the foreground's centre, area and
outline over time, and shape from the radius of the outline as a function of angle. Meant for clips
of one shape (:mod:`dit_accel.pipelines.tiny_wan.scenes`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.pipelines.tiny_wan import scenes

ANGLES = 72
_STEPS = 64


@dataclass(frozen=True, slots=True)
class Finding:
    """What the judge saw. ``None`` where nothing stands out from the background."""

    colour: str | None
    shape: str | None
    motion: str | None

    def agrees(self, scene: scenes.Scene) -> dict[str, bool]:
        """Per attribute, whether it is what a one-shape scene asked for."""
        if len(scene.movers) != 1:
            raise InputError(f"expected a scene of one shape, got {len(scene.movers)}")
        (wanted,) = scene.movers
        return {key: getattr(self, key) == getattr(wanted, key) for key in ATTRIBUTES}


ATTRIBUTES = ("colour", "shape", "motion")


def inspect(frames: Tensor) -> Finding:
    """Look at a clip.

    Args:
        frames: ``[T, 3, H, W]``, RGB in [0, 1], any floating dtype, at least 4 frames.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[0] < 4:
        raise InputError(f"frames: expected [T >= 4, 3, H, W], got {list(frames.shape)}")
    frames = frames.detach().float().cpu().clamp(0, 1)
    presence = _presence(frames)
    mask = _open(presence)
    area = mask.sum((1, 2))
    seen = area > 0.0015 * mask[0].numel()
    if int(seen.sum()) < max(3, frames.shape[0] // 3):
        return Finding(None, None, None)
    colour = _colour(frames[seen], mask[seen])
    track = _Track.of(mask[seen], seen.nonzero()[:, 0].float() / (frames.shape[0] - 1))
    profiles = _profiles(presence[seen], track)
    return Finding(colour, _shape(profiles, track.area), _motion(track, profiles))


def tally(pairs: Iterable[tuple[scenes.Scene, Finding]]) -> dict[str, float]:
    """Shares of clips in which each attribute, and all of them together, are right."""
    rows = [finding.agrees(scene) for scene, finding in pairs]
    if not rows:
        raise InputError("expected at least one clip, got none")
    share = {key: sum(row[key] for row in rows) / len(rows) for key in ATTRIBUTES}
    return {**share, "all": sum(all(row.values()) for row in rows) / len(rows)}


def _presence(frames: Tensor) -> Tensor:
    """How much each pixel differs from the background, ``[T, H, W]``, 1 inside the shape."""
    band = max(2, frames.shape[-1] // 40)
    border = torch.ones(frames.shape[-2:], dtype=torch.bool)
    border[band:-band, band:-band] = False
    ground = frames[:, :, border].permute(0, 2, 1).reshape(-1, 3)
    one, two = _shades(ground)
    axis = two - one
    pixels = frames.permute(0, 2, 3, 1) - one
    along = ((pixels @ axis) / axis.square().sum().clamp(min=1e-8)).clamp(0, 1)
    # torch's norm over three channels takes a hundred times as long
    distance = (pixels - along[..., None] * axis).square().sum(-1).sqrt()
    # Full presence is the colour of the shape: the far end of what differs.
    peak = (
        distance.flatten(1).topk(max(8, distance[0].numel() // 400), dim=1).values[:, -1].median()
    )
    return (distance / peak.clamp(min=0.2)).clamp(0, 1)


def _shades(ground: Tensor) -> tuple[Tensor, Tensor]:
    """The two shades of a texture by 2-means from the darkest and the brightest border pixels."""
    order = ground.sum(1).argsort()
    tail = max(1, len(order) // 20)
    centres = torch.stack([ground[order[:tail]].mean(0), ground[order[-tail:]].mean(0)])
    for _ in range(6):
        nearest = torch.cdist(ground, centres).argmin(1)
        for i in range(2):
            if bool((nearest == i).any()):
                centres[i] = ground[nearest == i].mean(0)
    return centres[0], centres[1]


def _open(presence: Tensor) -> Tensor:
    """Threshold at one half and drop specks thinner than three pixels."""
    mask = (presence > 0.5).float()[:, None]
    mask = -F.max_pool2d(-mask, 3, 1, 1)
    return F.max_pool2d(mask, 3, 1, 1)[:, 0] > 0.5


def _colour(frames: Tensor, mask: Tensor) -> str:
    inner = -F.max_pool2d(-mask.float()[:, None], 3, 1, 1)[:, 0] > 0.5
    picked = inner if bool(inner.any()) else mask
    mean = frames.permute(0, 2, 3, 1)[picked].median(0).values
    names, palette = zip(*scenes.COLOURS.items(), strict=True)
    return str(names[int((torch.tensor(palette) - mean).norm(dim=1).argmin())])


@dataclass(frozen=True, slots=True)
class _Track:
    """Centre (fractions of the height, ``y`` down), area (fraction of the frame) over time."""

    x: Tensor
    y: Tensor
    area: Tensor
    time: Tensor

    @staticmethod
    def of(mask: Tensor, time: Tensor) -> _Track:
        weight = mask.float()
        height, width = mask.shape[-2:]
        total = weight.sum((1, 2))
        ys = (torch.arange(height) + 0.5)[:, None] / height
        xs = (torch.arange(width) + 0.5) / height
        return _Track(
            (weight * xs).sum((1, 2)) / total,
            (weight * ys).sum((1, 2)) / total,
            total / (height * width),
            time,
        )


def _motion(track: _Track, profiles: Tensor) -> str:
    # Robust ends: the mean of the first and of the last quarter of what was seen.
    quarter = max(1, len(track.x) // 4)

    def change(series: Tensor) -> float:
        return float(series[-quarter:].mean() - series[:quarter].mean())

    dx, dy = change(track.x), change(track.y)
    ratio = float(track.area[-quarter:].mean() / track.area[:quarter].mean())
    swing = float(track.y.diff().abs().sum())
    if swing > 0.5 and swing > 2.2 * abs(dy) and swing > 3 * abs(dx):
        return "bounce"
    if ratio > 1.8 or ratio < 1 / 1.8:
        return "grow" if ratio > 1 else "shrink"
    if max(abs(dx), abs(dy)) > 0.1:
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"
    return "spin" if _turned(profiles) > 0.3 else "still"


def _turned(profiles: Tensor) -> float:
    """Total turn of the outline in radians, from the shift between neighbouring frames."""
    total = 0.0
    shifts = range(-6, 7)
    for before, after in itertools.pairwise(profiles):
        costs = torch.stack([(before.roll(s) - after).square().mean() for s in shifts])
        flat = float((before - before.mean()).square().mean())
        if flat > 4e-4:
            total += (int(costs.argmin()) - 6) * 2 * math.pi / ANGLES
    return abs(total)


def _profiles(presence: Tensor, track: _Track) -> Tensor:
    """Radius of the outline over its mean, ``[T, ANGLES]``, angle 0 pointing up, clockwise."""
    height, width = presence.shape[-2:]
    angle = torch.arange(ANGLES) * (2 * math.pi / ANGLES)
    reach = (track.area * width / height / math.pi).sqrt()[:, None, None] * 2.4
    rho = (torch.arange(_STEPS) + 0.5) / _STEPS * reach
    px = track.x[:, None, None] + rho * angle.sin()[:, None]
    py = track.y[:, None, None] - rho * angle.cos()[:, None]
    where = torch.stack([px * height / width * 2 - 1, py * 2 - 1], dim=-1)
    values = F.grid_sample(presence[:, None], where, align_corners=False)[:, 0]
    # The radius to the first exit, counted softly: everything past it is another object.
    inside = (values > 0.5).float().cumprod(-1) * values
    radius = inside.sum(-1) * (reach[:, :, 0] / _STEPS)
    return radius / radius.mean(1, keepdim=True).clamp(min=1e-6)


@cache
def _templates() -> Tensor:
    """Radius over angle of every shape, over its mean, ``[shapes, ANGLES]``."""
    angle = torch.arange(ANGLES) * (2 * math.pi / ANGLES)
    rows = []
    for index in range(len(scenes.SHAPES)):
        rho = torch.linspace(0.01, 1.2, 2400)
        dx, dy = rho * angle.sin()[:, None], -rho * angle.cos()[:, None]
        one, zero = torch.ones(()), torch.zeros(())
        inside = scenes.signed_distance(torch.tensor(index), dx, dy, one, zero) < 0
        rows.append(inside.float().sum(1) * (1.19 / 2400))
    table = torch.stack(rows)
    return table / table.mean(1, keepdim=True)


def _shape(profiles: Tensor, area: Tensor) -> str:
    """The template that fits best at its best rotation, over the larger half of the frames."""
    large = area >= area.median()
    templates = torch.stack([_templates().roll(s, 1) for s in range(ANGLES)], dim=1)
    misfit = (profiles[large][:, None, None] - templates).square().mean(-1).amin(-1)
    return scenes.SHAPES[int(misfit.median(0).values.argmin())]
