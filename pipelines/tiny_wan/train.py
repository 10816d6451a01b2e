"""The recipe of ``tiny-wan``: autoencoder first, then text encoder and transformer together.

Everything is seeded: scene ``i`` of the data and the noise of step ``n`` depend on the seed alone,
so an interrupted run that is taken up again sees what an uninterrupted one would have seen. Bit for
bit equality holds on one machine with one device; atomics on a GPU may differ in the last bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

from dit_accel.pipelines.tiny_wan import model
from dit_accel.pipelines.tiny_wan.recipe import Recipe, claim
from dit_accel.pipelines.tiny_wan.train_autoencoder import encode_dataset, train_autoencoder
from dit_accel.pipelines.tiny_wan.train_denoiser import train_denoiser
from dit_accel.pipelines.tiny_wan.training import Log

__all__ = ["Recipe", "train"]


def train(
    out: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    resume: bool = False,
    compile_blocks: bool = False,
    log: Log | None = None,
    pipe: WanPipeline | None = None,
) -> Path:
    """Train the whole model and write the pipeline to ``out/weights``.

    Args:
        out: folder of the run: ``log.jsonl``, ``autoencoder.pt``, ``denoiser.pt``, ``weights/``.
        recipe: every number of the run.
        device: ``cpu`` or ``cuda``.
        resume: take up the run found in ``out``; its recipe must be the same but for the number
            of steps.
        compile_blocks: compile the transformer's blocks.
        log: called with each record of the log besides the file.
        pipe: start from these modules instead of :func:`model.untrained` (tests use small ones).

    Raises:
        InputError: ``out`` holds another run and ``resume`` was not asked for, or its recipe is
            another.
    """
    out.mkdir(parents=True, exist_ok=True)
    claim(out, recipe, resume)
    if device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(recipe.seed)
    pipe = pipe if pipe is not None else model.untrained()
    pipe.to(device)
    with (out / "log.jsonl").open("a") as sink:

        def write(record: dict[str, Any]) -> None:
            sink.write(json.dumps(record) + "\n")
            sink.flush()
            if log is not None:
                log(record)

        train_autoencoder(pipe.vae, recipe, out / "autoencoder.pt", device, write)
        latents, tokens = encode_dataset(pipe, recipe, device, write)
        train_denoiser(
            pipe, latents, tokens, recipe, out / "denoiser.pt", device, write, compile_blocks
        )
    weights = out / "weights"
    model.save(pipe, weights)
    return weights
