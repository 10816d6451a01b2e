"""The world of ``tiny-wan``: procedural clips of moving shapes, with captions.

A scene is one or two shapes over a background. Everything is drawn from a seeded generator, so that
scene ``i`` of a data set is the same on every machine. Lengths are fractions of the clip's height,
angles are radians, ``x`` grows to the right and ``y`` downwards.

About one combination of colour, shape and motion in eight is held out of training
(:func:`held_out`); evaluation prompts are made of these alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

COLOURS: Final[dict[str, tuple[float, float, float]]] = {
    "red": (0.90, 0.12, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.92, 0.20),
    "green": (0.10, 0.75, 0.20),
    "cyan": (0.15, 0.90, 0.95),
    "blue": (0.10, 0.25, 1.00),
    "purple": (0.62, 0.15, 0.85),
    "white": (1.00, 1.00, 1.00),
}
"""Colours of shapes, RGB in [0, 1]."""

BACKGROUNDS: Final[dict[str, tuple[float, float, float]]] = {
    "black": (0.04, 0.04, 0.04),
    "gray": (0.45, 0.45, 0.45),
    "brown": (0.38, 0.24, 0.12),
    "blue": (0.12, 0.20, 0.48),
    "green": (0.10, 0.34, 0.16),
    "pink": (0.80, 0.52, 0.62),
}
"""Colours of backgrounds: darker or duller than any shape."""

TEXTURES: Final = ("plain", "striped", "checkered", "dotted")
SHAPES: Final = ("circle", "square", "triangle", "star")
MOTIONS: Final[dict[str, str]] = {
    "right": "moves right",
    "left": "moves left",
    "up": "moves up",
    "down": "moves down",
    "bounce": "bounces",
    "grow": "grows",
    "shrink": "shrinks",
    "spin": "spins",
}
"""Motions and their verb phrases, third person singular."""

SIZE_FACTOR: Final = {"circle": 1.0, "square": 1.2, "triangle": 1.35, "star": 1.35}
"""Circumradius relative to a circle of similar visual weight."""

STAR_INNER: Final = 0.45
"""Inner over outer radius of the star."""


@dataclass(frozen=True, slots=True)
class Mover:
    """One shape and its motion through the clip."""

    colour: str
    shape: str
    motion: str


@dataclass(frozen=True, slots=True)
class Scene:
    """What a clip shows. ``movers`` holds one or two shapes; equal ones are told in the plural."""

    movers: tuple[Mover, ...]
    background: str
    texture: str

    def caption(self, rng: random.Random | None = None) -> str:
        """The sentence that describes the scene; ``rng`` varies its wording, ``None`` does not."""
        return caption(self, rng)


def held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether a combination never occurs in training: 31 of 248, spread over every value."""
    colours, motions = list(COLOURS), list(MOTIONS)
    index = 3 * colours.index(colour) + 5 * SHAPES.index(shape) + motions.index(motion)
    return index % 8 == 0


def combinations() -> list[Mover]:
    """Every combination that can be seen: a spinning circle can not."""
    return [
        Mover(colour, shape, motion)
        for colour in COLOURS
        for shape in SHAPES
        for motion in MOTIONS
        if not (shape == "circle" and motion == "spin")
    ]


def compatible(colour: str, background: str) -> bool:
    """Whether a shape of this colour stands out from the background."""
    return colour != background and (colour, background) not in {("purple", "blue")}


def evaluation_scenes(count: int = 64) -> list[Scene]:
    """The first ``count`` evaluation prompts: one shape, held-out combinations only."""
    movers = [m for m in combinations() if held_out(m.colour, m.shape, m.motion)]
    scenes: list[Scene] = []
    turn = 0
    while len(scenes) < count:
        for i, mover in enumerate(movers):
            grounds = [b for b in BACKGROUNDS if compatible(mover.colour, b)]
            texture = TEXTURES[(i + turn) % 4] if turn % 2 else "plain"
            scenes.append(Scene((mover,), grounds[(i + 2 * turn) % len(grounds)], texture))
        turn += 1
    return scenes[:count]


def sample_scene(rng: random.Random) -> Scene:
    """Draw a training scene: 60% one shape, 20% two alike, 20% two that differ."""
    movers = _TRAINING
    first = rng.choice(movers)
    kind = rng.random()
    if kind < 0.6:
        chosen: tuple[Mover, ...] = (first,)
    elif kind < 0.8:
        chosen = (first, first)
    else:
        shared = [m for m in movers if m.motion == first.motion and m != first]
        other = rng.choice(shared if rng.random() < 0.5 else movers)
        chosen = (first, other)
    grounds = [b for b in BACKGROUNDS if all(compatible(m.colour, b) for m in chosen)]
    texture = "plain" if rng.random() < 0.5 else rng.choice(TEXTURES[1:])
    return Scene(chosen, rng.choice(grounds), texture)


_TRAINING: Final = [m for m in combinations() if not held_out(m.colour, m.shape, m.motion)]


# -- captions ---------------------------------------------------------------------------------


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describe a scene in the grammar the model knows. See :meth:`Scene.caption`."""
    place = "on" if rng is not None and rng.random() < 0.25 else "over"
    ground = scene.background if scene.texture == "plain" else f"{scene.texture} {scene.background}"
    if rng is not None and scene.texture == "plain" and rng.random() < 0.2:
        ground = f"plain {ground}"
    tail = f"{place} a {ground} background"
    if len(scene.movers) == 1:
        (one,) = scene.movers
        return f"{_noun(one)} {_verb(one.motion, False, rng)} {tail}"
    one, two = scene.movers
    if one == two:
        return f"two {one.colour} {one.shape}s {_verb(one.motion, True, rng)} {tail}"
    if one.motion == two.motion:
        return f"{_noun(one)} and {_noun(two)} {_verb(one.motion, True, rng)} {tail}"
    first = f"{_noun(one)} {_verb(one.motion, False, rng)}"
    second = f"{_noun(two)} {_verb(two.motion, False, rng)}"
    return f"{first} and {second} {tail}"


def _noun(mover: Mover) -> str:
    article = "an" if mover.colour[0] in "aeiou" else "a"
    return f"{article} {mover.colour} {mover.shape}"


def _verb(motion: str, plural: bool, rng: random.Random | None) -> str:
    phrase = MOTIONS[motion]
    if rng is not None and motion in ("left", "right") and rng.random() < 0.2:
        phrase = f"moves to the {motion}"
    if not plural:
        return phrase
    verb, *rest = phrase.split(" ")
    return " ".join([verb.removesuffix("s"), *rest])


def vocabulary() -> list[str]:
    """Every word the captions are made of, sorted."""
    words = {"a", "an", "two", "and", "over", "on", "background", "to", "the", *TEXTURES}
    words |= {*COLOURS, *BACKGROUNDS, *SHAPES, *(f"{shape}s" for shape in SHAPES)}
    for phrase in MOTIONS.values():
        verb, *rest = phrase.split(" ")
        words |= {verb, verb.removesuffix("s"), *rest}
    return sorted(words)


# -- trajectories -----------------------------------------------------------------------------


def trajectories(scene: Scene, rng: random.Random, frames: int) -> Tensor:
    """Draw where the shapes of a scene are: fp32 ``[2, frames, 4]``, ``(x, y, radius, angle)``.

    A second shape that does not exist has radius 0. Two shapes never overlap.
    """
    path = torch.zeros(2, frames, 4)
    pair = len(scene.movers) == 2
    motions = {m.motion for m in scene.movers}
    # Two shapes get half of the frame each: rows when one of them needs the width, else columns.
    rows = bool(motions & {"left", "right"}) and not motions & {"up", "down", "bounce"}
    if pair and not rows and motions & {"left", "right"}:
        rows = False
    order = rng.sample((0, 1), 2)
    for i, mover in enumerate(scene.movers):
        box = (0.0, 0.0, 1.0, 1.0)
        if pair:
            low, high = order[i] / 2, order[i] / 2 + 0.5
            box = (0.0, low, 1.0, high) if rows else (low, 0.0, high, 1.0)
        path[i] = _path(mover, box, rng, frames)
    return path


def _path(
    mover: Mover, box: tuple[float, float, float, float], rng: random.Random, frames: int
) -> Tensor:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    small = min(width, height)
    factor = SIZE_FACTOR[mover.shape]
    time = torch.linspace(0, 1, frames)
    radius = torch.full(
        (frames,), rng.uniform(0.115, 0.165) if small == 1 else rng.uniform(0.09, 0.12)
    )
    angle = torch.full((frames,), rng.uniform(-0.12, 0.12))
    if mover.motion in ("grow", "shrink"):
        low, high = rng.uniform(0.06, 0.085), rng.uniform(0.19, 0.26)
        if small < 1:
            low, high = low * 0.75, rng.uniform(0.13, 0.155)
        radius = torch.lerp(torch.tensor(low), torch.tensor(high), time)
        radius = radius.flip(0) if mover.motion == "shrink" else radius
    elif mover.motion == "spin":
        turn = rng.choice((-1, 1)) * rng.uniform(1.9, 3.6)
        angle = rng.uniform(-math.pi, math.pi) + turn * time
    reach = float(radius.max()) * factor + 0.02

    def place(low: float, high: float) -> float:
        low, high = low + reach, high - reach
        return rng.uniform(low, high) if low < high else (low + high) / 2

    x = torch.full((frames,), place(left, right))
    y = torch.full((frames,), place(top, bottom))
    if mover.motion in ("left", "right", "up", "down"):
        low, high = (left, right) if mover.motion in ("left", "right") else (top, bottom)
        span = high - low - 2 * reach
        travel = span * rng.uniform(0.7, 1.0)
        start = low + reach + rng.uniform(0, span - travel)
        run = start + travel * time
        run = run.flip(0) if mover.motion in ("left", "up") else run
        if mover.motion in ("left", "right"):
            x = run
        else:
            y = run
    elif mover.motion == "bounce":
        floor = bottom - reach
        jump = min(rng.uniform(0.4, 0.55), height - 2 * reach)
        phase = rng.uniform(0, 1)
        y = floor - jump * torch.sin(math.pi * (2.2 * time + phase)).abs()
    return torch.stack([x, y, radius * factor, angle], dim=-1)


# -- pixels -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Scenes ready to be drawn, as tensors; :func:`render` turns them into clips."""

    paths: Tensor
    shapes: Tensor
    colours: Tensor
    ground: Tensor
    texture: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same scenes on another device."""
        fields = (self.paths, self.shapes, self.colours, self.ground, self.texture)
        return Batch(*(f.to(device) for f in fields))

    def __getitem__(self, index: slice | Tensor) -> Batch:
        fields = (self.paths, self.shapes, self.colours, self.ground, self.texture)
        return Batch(*(f[index] for f in fields))


def stage(scenes: Sequence[Scene], rngs: Sequence[random.Random], frames: int) -> Batch:
    """Draw the free parameters of each scene from its own generator."""
    shades, grounds, textures, kinds, paths = [], [], [], [], []
    for scene, rng in zip(scenes, rngs, strict=True):
        paths.append(trajectories(scene, rng, frames))
        pad = scene.movers[-1:] * (2 - len(scene.movers))
        movers = scene.movers + pad
        kinds.append([SHAPES.index(m.shape) for m in movers])
        shades.append([[c * rng.uniform(0.94, 1.0) for c in COLOURS[m.colour]] for m in movers])
        grounds.append(BACKGROUNDS[scene.background])
        period, turn = rng.uniform(0.11, 0.18), rng.choice((0.0, math.pi / 2, math.pi / 4))
        textures.append([TEXTURES.index(scene.texture), period, turn, rng.random(), rng.random()])
    return Batch(
        torch.stack(paths),
        torch.tensor(kinds),
        torch.tensor(shades),
        torch.tensor(grounds),
        torch.tensor(textures),
    )


def render(batch: Batch, height: int, width: int) -> Tensor:
    """Draw clips, anti-aliased: fp32 ``[B, 3, T, height, width]`` in [-1, 1], as for a VAE."""
    device = batch.paths.device
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / height
    aspect = width / height
    image = _ground(batch, x, y)[:, :, None]
    for i in range(2):
        cx, cy, radius, angle = batch.paths[:, i, :, :, None, None].unbind(2)
        dx, dy = x - cx * aspect, y[:, None] - cy
        distance = signed_distance(batch.shapes[:, i, None, None, None], dx, dy, radius, angle)
        alpha = (0.5 - distance * height).clamp(0, 1) * (radius > 0)
        colour = batch.colours[:, i, :, None, None, None]
        image = torch.lerp(image, colour, alpha[:, None])
    return image * 2 - 1


def signed_distance(shape: Tensor, dx: Tensor, dy: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Signed distance to the outline: exact for the circle, by the edge's line for polygons."""
    rho = torch.sqrt(dx * dx + dy * dy + 1e-12)
    theta = torch.atan2(dx, -dy) - angle
    result = rho - radius
    for index, (corners, inner) in enumerate(((4, None), (3, None), (5, STAR_INNER)), start=1):
        sector = 2 * math.pi / corners
        # A square rests on its side, triangle and star stand with a corner up.
        turned = theta + (sector / 2 if corners == 4 else 0.0)
        folded = torch.remainder(turned + sector / 2, sector) - sector / 2
        if inner is None:
            inner = math.cos(sector / 2)
        px, py = rho * folded.abs().cos(), rho * folded.abs().sin()
        # The edge runs from the corner (radius, 0) to the next inner vertex.
        ex, ey = inner * math.cos(sector / 2) - 1, inner * math.sin(sector / 2)
        norm = math.hypot(ex, ey)
        edge = ((px - radius) * ey - py * ex) / norm
        result = torch.where(shape == index, edge, result)
    return result


def _ground(batch: Batch, x: Tensor, y: Tensor) -> Tensor:
    kind, period, turn, u, v = batch.texture[:, :, None, None].unbind(1)
    gx, gy = x[None, None, :], y[None, :, None]
    along = (gx * turn.cos() + gy * turn.sin()) / period + u
    across = (gy * turn.cos() - gx * turn.sin()) / period + v
    stripes = (along % 1 - 0.5).abs() - 0.25
    checks = torch.sin(2 * math.pi * along) * torch.sin(2 * math.pi * across) * 0.16
    dots = torch.hypot(along % 1 - 0.5, across % 1 - 0.5) - 0.27
    signed = torch.where(kind == 1, stripes, torch.where(kind == 2, checks, dots))
    dark = (0.5 + signed * period * y.shape[0]).clamp(0, 1) * (kind > 0)
    base = batch.ground[:, :, None, None]
    shade = base * 0.72 + 0.05 * (base.amax(1, keepdim=True) < 0.1)
    return torch.lerp(base.expand(-1, -1, y.shape[0], x.shape[0]), shade, dark[:, None])


def dataset(seed: int, indices: Sequence[int], frames: int) -> tuple[Batch, list[str]]:
    """Scenes ``indices`` of the training set of ``seed``, staged, with their captions."""
    rngs = [random.Random(f"{seed}/{i}") for i in indices]
    scenes = [sample_scene(rng) for rng in rngs]
    captions = [scene.caption(rng) for scene, rng in zip(scenes, rngs, strict=True)]
    return stage(scenes, rngs, frames), captions
