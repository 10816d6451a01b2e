"""The numbers of a training run, and its claim on a folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dit_accel.errors import InputError
from dit_accel.pipelines.tiny_wan import model


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every number of a training run.

    The defaults are those of the shipped weights, whose autoencoder was trained in two runs: 1,193
    steps, with the rate falling to zero, and on from there to 3,028.
    """

    seed: int = 0
    frames: int = model.FRAMES
    height: int = model.HEIGHT
    width: int = model.WIDTH
    autoencoder_steps: int = 3028
    autoencoder_batch: int = 32
    autoencoder_frames: int = 9
    autoencoder_crop: int = 64
    autoencoder_lr: float = 2e-3
    kl_weight: float = 1e-5
    clips: int = 98304
    steps: int = 5153
    batch: int = 128
    lr: float = 1.5e-3
    warmup: int = 300
    decay_share: float = 0.3
    drop_caption: float = 0.1
    ema: float = 0.9990
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("autoencoder_steps", "autoencoder_batch", "clips", "steps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected a positive integer, got {getattr(self, name)}")
        if self.frames % 4 != 1 or self.autoencoder_frames % 4 != 1:
            raise InputError(
                f"frames: expected one more than a multiple of 4, got {self.frames} "
                f"and {self.autoencoder_frames}"
            )
        if self.autoencoder_frames > self.frames:
            raise InputError(
                f"autoencoder_frames: expected at most frames ({self.frames}), "
                f"got {self.autoencoder_frames}"
            )


def claim(out: Path, recipe: Recipe, resume: bool) -> None:
    """Write the recipe into a run's folder, or see that it is the one that lies there.

    Raises:
        InputError: ``out`` holds another run and ``resume`` was not asked for, or the recipes
            differ in more than the number of steps.
    """
    path = out / "recipe.json"
    mine = asdict(recipe)
    if path.exists():
        theirs = json.loads(path.read_text())
        if not resume:
            raise InputError(f"{out}: holds a run already; expected --resume or another folder")
        free = {"steps", "autoencoder_steps", "checkpoint_every"}
        changed = [k for k in mine if k not in free and mine[k] != theirs.get(k)]
        if changed:
            told = ", ".join(f"{k} {theirs.get(k)} -> {mine[k]}" for k in changed)
            raise InputError(f"{out}: expected the recipe of the run to take up, got {told}")
    path.write_text(json.dumps(mine, indent=2) + "\n")
