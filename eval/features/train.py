"""The recipe of the features for the embedded domain. Some minutes on a CPU.

::

    python -m dit_accel.eval.features.train first.safetensors
    python -m dit_accel.eval.features.train weights.safetensors --after first.safetensors
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.eval.features.network import HEADS, SIZE, ClipNet, load, picked, save
from dit_accel.pipelines.tiny_wan import model, scenes

Log = Callable[[dict[str, Any]], None]


def batch_of(seed: int, first: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Clips of one shape and what they show; number ``i`` of a seed is the same on every machine.

    Every combination occurs, those held out of the model's training included.

    Returns:
        ``[count, 3, 8, 64, 64]`` in [-1, 1], and int64 ``[count]`` answers by question.
    """
    movers = scenes.combinations()
    rngs = [random.Random(f"features/{seed}/{i}") for i in range(first, first + count)]
    chosen = []
    for rng in rngs:
        mover = rng.choice(movers)
        grounds = [b for b in scenes.BACKGROUNDS if scenes.compatible(mover.colour, b)]
        chosen.append(scenes.Scene((mover,), rng.choice(grounds), rng.choice(scenes.TEXTURES)))
    staged = scenes.stage(chosen, rngs, model.FRAMES)
    looked_at = scenes.Batch(
        staged.paths[:, :, picked(model.FRAMES)],
        staged.shapes,
        staged.colours,
        staged.ground,
        staged.texture,
    )
    told = [
        {
            "colour": scene.movers[0].colour,
            "shape": scene.movers[0].shape,
            "motion": scene.movers[0].motion,
            "background": scene.background,
            "texture": scene.texture,
        }
        for scene in chosen
    ]
    answers = {
        name: torch.tensor([known.index(one[name]) for one in told])
        for name, known in HEADS.items()
    }
    return scenes.render(looked_at, SIZE, SIZE), answers


def train(
    steps: int = 900,
    batch: int = 32,
    lr: float = 3e-3,
    seed: int = 0,
    after: Path | None = None,
    log: Log | None = None,
) -> ClipNet:
    """AdamW, the rate rising for 30 steps and then falling to zero.

    Args:
        steps, batch, lr: of the run.
        seed: of the first weights and of the clips.
        after: weights to go on from, with clips of the next seed; from nothing by default.
        log: called every 50 steps.
    """
    torch.manual_seed(seed)
    network = (ClipNet() if after is None else load(after)).train()
    seed = seed if after is None else seed + 1
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.02)
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / 30) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        clips, answers = batch_of(seed, step * batch, batch)
        logits = network.answers(network(clips))
        losses = {name: F.cross_entropy(logits[name], answers[name]) for name in HEADS}
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        if log is not None and (step % 50 == 0 or step == steps - 1):
            log({"step": step, **{name: round(loss.item(), 4) for name, loss in losses.items()}})
    return network.eval()


@torch.inference_mode()
def calibrate(network: ClipNet, seed: int = 2000, clips: int = 1024) -> None:
    """Learn the mean and the deviation of every feature on clips of another seed."""
    rows = torch.cat([network(batch_of(seed, i, 64)[0]) for i in range(0, clips, 64)])
    network.centre.copy_(rows.mean(0))
    network.spread.copy_(rows.std(0).clamp(min=1e-3))


@torch.inference_mode()
def accuracy(network: ClipNet, seed: int = 1000, clips: int = 512) -> dict[str, float]:
    """Share of right answers on clips of another seed."""
    right = dict.fromkeys(HEADS, 0)
    for first in range(0, clips, 64):
        count = min(64, clips - first)
        frames, answers = batch_of(seed, first, count)
        logits = network.answers(network(frames))
        for name in HEADS:
            right[name] += int((logits[name].argmax(1) == answers[name]).sum())
    return {name: count / clips for name, count in right.items()}


def main() -> None:
    """Train, write, and say how well it does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--after", type=Path)
    given = parser.parse_args()
    network = train(given.steps, after=given.after, log=lambda record: print(record, flush=True))
    calibrate(network)
    save(network, given.out)
    print({"bytes": given.out.stat().st_size, "accuracy": accuracy(network)})


if __name__ == "__main__":
    main()
