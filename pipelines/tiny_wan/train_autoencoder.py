"""The first stage: an autoencoder for clips, and the latents of all training clips."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from dit_accel.errors import InputError
from dit_accel.pipelines.tiny_wan import scenes
from dit_accel.pipelines.tiny_wan.recipe import Recipe
from dit_accel.pipelines.tiny_wan.training import (
    Graph,
    Log,
    fill_lr,
    load_checkpoint,
    noise_of,
    rate_at,
    save_checkpoint,
)


def train_autoencoder(
    vae: AutoencoderKLWan, recipe: Recipe, checkpoint: Path, device: str, log: Log
) -> None:
    """Train by reconstruction of pixels and of their differences, with a light KL term.

    The whole step is one CUDA graph on a GPU: launching the kernels of the autoencoder's frame by
    frame loops takes several times longer than running them. Loads and returns at once what
    ``checkpoint`` says is finished.
    """
    graphed = device != "cpu"
    lr = torch.tensor(recipe.autoencoder_lr, device=device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr, weight_decay=0.0, capturable=graphed)
    first = load_checkpoint(checkpoint, {"vae": vae}, [optimizer])
    for group in optimizer.param_groups:
        # A loaded state brings its own rate, on the CPU; the graph reads this one.
        group.update(lr=lr, capturable=graphed)
    if first == 0:
        _quiet_posterior(vae)
    vae.train()

    def update(clips: Tensor, noise: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        posterior = vae.encode(clips).latent_dist
        mean, logvar = posterior.mean, posterior.logvar
        restored = _decode_unclamped(vae, mean + posterior.std * noise)
        pixel, square = F.l1_loss(restored, clips), F.mse_loss(restored, clips)
        edges = sum(F.l1_loss(restored.diff(dim=d), clips.diff(dim=d)) for d in (2, 3, 4))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        # The square pulls first where the absolute difference is content with the background.
        loss = pixel + 2 * square + edges + recipe.kl_weight * kl
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        told = {"loss": loss, "l1": pixel, "kl": kl, "psnr": -10 * (square / 4).log10()}
        return {name: value.detach() for name, value in told.items()}

    run = Graph(update, optimizer) if graphed else update
    started = time.perf_counter()
    for step in range(first, recipe.autoencoder_steps):
        clips = _autoencoder_batch(recipe, step, device)
        cells = (1 + (clips.shape[2] - 1) // 2, clips.shape[3] // 8, clips.shape[4] // 8)
        latent = (len(clips), vae.config.z_dim, *cells)
        noise = noise_of(latent, f"{recipe.seed}/ae/{step}", device)
        rate = rate_at(step, recipe.autoencoder_steps, 100, 0.9)
        fill_lr([optimizer], recipe.autoencoder_lr * rate)
        told = run(clips, noise)
        done = step + 1
        if done % 50 == 0 or done == recipe.autoencoder_steps:
            values = {name: value.item() for name, value in told.items()}
            seconds = time.perf_counter() - started
            log({"stage": "autoencoder", "step": done, **values, "seconds": seconds})
        if done % recipe.checkpoint_every == 0 or done == recipe.autoencoder_steps:
            save_checkpoint(checkpoint, done, {"vae": vae}, [optimizer])
    vae.eval()


@torch.no_grad()
def _quiet_posterior(vae: AutoencoderKLWan) -> None:
    """Start from small posterior variances: at 1, noise drowns the latents and little is learnt."""
    vae.quant_conv.weight[vae.config.z_dim :].mul_(0.1)
    vae.quant_conv.bias[vae.config.z_dim :].fill_(-5.0)


def _autoencoder_batch(recipe: Recipe, step: int, device: str) -> Tensor:
    size = recipe.autoencoder_batch
    # Scenes of their own: negative numbers, so that none is one of the denoiser's.
    indices = [-1 - i for i in range(step * size, (step + 1) * size)]
    batch, _ = scenes.dataset(recipe.seed, indices, recipe.frames)
    draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)

    def start(free: int) -> int:
        return int(torch.randint(free + 1, (), generator=draw))

    first = start(recipe.frames - recipe.autoencoder_frames)
    window = replace(batch, paths=batch.paths[:, :, first : first + recipe.autoencoder_frames])
    clips = scenes.render(window.to(device), recipe.height, recipe.width)
    crop = min(recipe.autoencoder_crop, recipe.height, recipe.width)
    top, left = start(recipe.height - crop), start(recipe.width - crop)
    return clips[..., top : top + crop, left : left + crop].contiguous()


def _decode_unclamped(vae: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """``vae.decode`` without its final clamp, which would stop the gradient."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latent)
    frames = []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(
                hidden[:, :, i : i + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=i == 0,
            )
        )
    vae.clear_cache()
    return unpatchify(torch.cat(frames, 2), vae.config.patch_size or 1)


@torch.no_grad()
def encode_dataset(
    pipe: WanPipeline, recipe: Recipe, device: str, log: Log, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Latents of all training clips and the tokens of their captions.

    Also measures the latents' mean and deviation by channel and writes them into the
    autoencoder's configuration, where the pipeline looks for them.

    Returns:
        Normalised latents, bf16 ``[clips, z, t, h, w]`` (fp32 on the CPU), and int64
        ``[clips + 1, longest]`` tokens; the last row is the empty caption.
    """
    started = time.perf_counter()
    store = torch.float32 if device == "cpu" else torch.bfloat16
    latents: Tensor | None = None
    captions: list[str] = []
    for start in range(0, recipe.clips, chunk):
        indices = range(start, min(start + chunk, recipe.clips))
        batch, texts = scenes.dataset(recipe.seed, indices, recipe.frames)
        captions += texts
        clips = scenes.render(batch.to(device), recipe.height, recipe.width)
        encoded = pipe.vae.encode(clips).latent_dist.mode()
        if latents is None:
            latents = torch.empty((recipe.clips, *encoded.shape[1:]), dtype=store, device=device)
        latents[start : start + len(texts)] = encoded.to(store)
    assert latents is not None
    sample = latents[: min(recipe.clips, 4096)].double()
    mean, std = sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))
    pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    shape = (1, -1, 1, 1, 1)
    for start in range(0, recipe.clips, 4096):
        part = latents[start : start + 4096]
        part.copy_(((part.float() - mean.float().view(shape)) / std.float().view(shape)).to(store))
    tokens = pipe.tokenizer([*captions, ""], padding=True, return_tensors="pt").input_ids
    if bool((tokens == pipe.tokenizer.unk_token_id).any()):
        raise InputError("expected every caption inside the vocabulary, got an unknown word")
    log({"stage": "latents", "clips": recipe.clips, "seconds": time.perf_counter() - started})
    return latents, tokens.to(device)
