"""The second stage: text encoder and transformer together, by flow matching."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from torch import Tensor, nn

from dit_accel.pipelines.tiny_wan import model
from dit_accel.pipelines.tiny_wan.recipe import Recipe
from dit_accel.pipelines.tiny_wan.training import (
    Log,
    autocast,
    fill_lr,
    load_checkpoint,
    noise_of,
    rate_at,
    save_checkpoint,
)


def train_denoiser(
    pipe: WanPipeline,
    latents: Tensor,
    tokens: Tensor,
    recipe: Recipe,
    checkpoint: Path,
    device: str,
    log: Log,
    compile_blocks: bool = False,
) -> None:
    """Flow matching: predict ``noise - clean`` at ``x = (1 - σ) clean + σ noise``.

    ``σ`` is logit-normal, shifted as the sampler shifts it, with one draw in five uniform. The
    pipeline is left with the exponential moving average of the weights.
    """
    modules = nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    ema = {name: p.detach().clone() for name, p in modules.named_parameters()}
    optimizers = _optimizers(modules, recipe.lr)
    first = load_checkpoint(checkpoint, {"modules": modules}, optimizers, ema)
    modules.train()
    if compile_blocks:
        pipe.transformer.compile_repeated_blocks()
    started, window = time.perf_counter(), 0.0
    for step in range(first, recipe.steps):
        rate = rate_at(step, recipe.steps, recipe.warmup, recipe.decay_share)
        fill_lr(optimizers, recipe.lr * rate)
        loss = _flow_loss(pipe, latents, tokens, recipe, step, device)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        done = step + 1
        keep = min(recipe.ema, done / (done + 9))
        with torch.no_grad():
            live = [p.detach() for p in modules.parameters()]
            torch._foreach_lerp_(list(ema.values()), live, 1 - keep)
        if done % 50 == 0 or done == recipe.steps:
            value = loss.item()
            window = value if window == 0.0 else 0.8 * window + 0.2 * value
            log(
                {
                    "stage": "denoiser",
                    "step": done,
                    "loss": value,
                    "smoothed": window,
                    "lr": recipe.lr * rate,
                    "seconds": time.perf_counter() - started,
                }
            )
        if done % recipe.checkpoint_every == 0 or done == recipe.steps:
            save_checkpoint(checkpoint, done, {"modules": modules}, optimizers, ema)
    with torch.no_grad():
        for name, p in modules.named_parameters():
            p.copy_(ema[name])
    modules.eval()


def _flow_loss(
    pipe: WanPipeline, latents: Tensor, tokens: Tensor, recipe: Recipe, step: int, device: str
) -> Tensor:
    draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    index = torch.randint(recipe.clips, (recipe.batch,), generator=draw)
    dropped = torch.rand(recipe.batch, generator=draw) < recipe.drop_caption
    words = tokens[torch.where(dropped, recipe.clips, index).to(device)]
    clean = latents[index.to(device)].float()
    noise = noise_of(clean.shape, f"{recipe.seed}/noise/{step}", device)
    level = torch.randn(recipe.batch, generator=draw).sigmoid()
    uniform = torch.rand(recipe.batch, generator=draw)
    level = torch.where(torch.rand(recipe.batch, generator=draw) < 0.2, uniform, level)
    sigma = model.FLOW_SHIFT * level / (1 + (model.FLOW_SHIFT - 1) * level)
    mix = sigma.to(device).view(-1, 1, 1, 1, 1)
    noisy = torch.lerp(clean, noise, mix)
    with autocast(device):
        embedded = embed(pipe, words)
        predicted = pipe.transformer(noisy, (sigma * 1000).to(device), embedded).sample
    return F.mse_loss(predicted.float(), noise - clean)


def embed(pipe: WanPipeline, words: Tensor) -> Tensor:
    """Text embeddings ``[B, 512, text_dim]`` as ``WanPipeline`` makes them: zero past the end."""
    mask = (words != pipe.tokenizer.pad_token_id).long()
    hidden = pipe.text_encoder(words, mask).last_hidden_state * mask[..., None]
    return F.pad(hidden, (0, 0, 0, model.TEXT_LENGTH - hidden.shape[1]))


def _optimizers(modules: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in modules.named_parameters():
        inner = name.startswith("transformer.blocks.") and p.ndim == 2
        (matrices if inner else others).append(p)
    return [
        torch.optim.Muon(matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
