"""The recipe of ``tiny-wan``: autoencoder first, then text encoder and transformer together.

Everything is seeded: scene ``i`` of the data and the noise of step ``n`` depend on the seed alone,
so an interrupted run that is taken up again sees what an uninterrupted one would have seen. Bit for
bit equality holds on one machine with one device; atomics on a GPU may differ in the last bit.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from dit_accel.errors import InputError
from dit_accel.pipelines.tiny_wan import model, scenes

Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every number of a training run. The defaults made the shipped weights."""

    seed: int = 0
    frames: int = model.FRAMES
    height: int = model.HEIGHT
    width: int = model.WIDTH
    autoencoder_steps: int = 4000
    autoencoder_batch: int = 32
    autoencoder_frames: int = 9
    autoencoder_crop: int = 64
    autoencoder_lr: float = 2e-3
    kl_weight: float = 1e-5
    clips: int = 98304
    steps: int = 8000
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
        InputError: ``out`` holds another run and ``resume`` was not asked for, or its recipe differs.
    """
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, recipe, resume)
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


def _claim(out: Path, recipe: Recipe, resume: bool) -> None:
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


# -- the autoencoder --------------------------------------------------------------------------


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
    first = _load(checkpoint, {"vae": vae}, [optimizer])
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

    run = _Graph(update, optimizer) if graphed else update
    started = time.perf_counter()
    for step in range(first, recipe.autoencoder_steps):
        clips = _autoencoder_batch(recipe, step, device)
        latent = (len(clips), vae.config.z_dim, 1 + (clips.shape[2] - 1) // 2)
        latent = (*latent, clips.shape[3] // 8, clips.shape[4] // 8)
        noise = _noise(latent, f"{recipe.seed}/ae/{step}", device)
        rate = _schedule(step, recipe.autoencoder_steps, 100, 0.9)
        _fill_lr([optimizer], recipe.autoencoder_lr * rate)
        told = run(clips, noise)
        done = step + 1
        if done % 50 == 0 or done == recipe.autoencoder_steps:
            values = {name: value.item() for name, value in told.items()}
            seconds = time.perf_counter() - started
            log({"stage": "autoencoder", "step": done, **values, "seconds": seconds})
        if done % recipe.checkpoint_every == 0 or done == recipe.autoencoder_steps:
            _save(checkpoint, done, {"vae": vae}, [optimizer])
    vae.eval()


class _Graph:
    """A training step captured as a CUDA graph at its first call, replayed afterwards."""

    def __init__(
        self, update: Callable[..., dict[str, Tensor]], optimizer: torch.optim.Optimizer
    ) -> None:
        self.update, self.optimizer = update, optimizer
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        if self.graph is None:
            self._capture(inputs)
        else:
            for kept, new in zip(self.inputs, inputs, strict=True):
                kept.copy_(new)
        assert self.graph is not None
        self.graph.replay()
        return self.result

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(x.clone() for x in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Warm-up steps must not train: the rate is zero until the graph exists.
        rate = float(self.optimizer.param_groups[0]["lr"])
        _fill_lr([self.optimizer], 0.0)
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.update(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = self.update(*self.inputs)
        _fill_lr([self.optimizer], rate)


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


# -- the denoiser -----------------------------------------------------------------------------


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
    first = _load(checkpoint, {"modules": modules}, optimizers, ema)
    modules.train()
    if compile_blocks:
        pipe.transformer.compile_repeated_blocks()
    started, window = time.perf_counter(), 0.0
    for step in range(first, recipe.steps):
        rate = _schedule(step, recipe.steps, recipe.warmup, recipe.decay_share)
        _fill_lr(optimizers, recipe.lr * rate)
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
            _save(checkpoint, done, {"modules": modules}, optimizers, ema)
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
    noise = _noise(clean.shape, f"{recipe.seed}/noise/{step}", device)
    level = torch.randn(recipe.batch, generator=draw).sigmoid()
    uniform = torch.rand(recipe.batch, generator=draw)
    level = torch.where(torch.rand(recipe.batch, generator=draw) < 0.2, uniform, level)
    sigma = model.FLOW_SHIFT * level / (1 + (model.FLOW_SHIFT - 1) * level)
    mix = sigma.to(device).view(-1, 1, 1, 1, 1)
    noisy = torch.lerp(clean, noise, mix)
    with _autocast(device):
        embedded = embed(pipe, words)
        predicted = pipe.transformer(noisy, (sigma * 1000).to(device), embedded).sample
    return F.mse_loss(predicted.float(), noise - clean)


def embed(pipe: WanPipeline, words: Tensor) -> Tensor:
    """Text embeddings ``[B, 512, text_dim]`` as stock ``WanPipeline`` makes them: zero past the end."""
    mask = (words != pipe.tokenizer.pad_token_id).long()
    hidden = pipe.text_encoder(words, mask).last_hidden_state * mask[..., None]
    return F.pad(hidden, (0, 0, 0, model.TEXT_LENGTH - hidden.shape[1]))


def _optimizers(modules: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices, others = [], []
    for name, p in modules.named_parameters():
        inner = name.startswith("transformer.blocks.") and p.ndim == 2
        (matrices if inner else others).append(p)
    return [
        torch.optim.Muon(matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


# -- shared -----------------------------------------------------------------------------------


def _schedule(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Linear warm-up, plateau, linear decay to zero over the last ``decay_share`` of the steps."""
    rise = min(1.0, (step + 1) / warmup)
    return rise * min(1.0, (steps - step) / max(1.0, decay_share * steps))


def _fill_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def _noise(shape: Sequence[int], seed: str, device: str) -> Tensor:
    """Standard normal numbers from a seed of their own, drawn on the device."""
    generator = torch.Generator(device).manual_seed(_hash(seed))
    return torch.randn(shape, generator=generator, device=device)


def _hash(text: str) -> int:
    value = 1469598103934665603
    for byte in text.encode():
        value = ((value ^ byte) * 1099511628211) % (1 << 63)
    return value


@contextlib.contextmanager
def _autocast(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    with torch.autocast("cuda", torch.bfloat16):
        yield


def _save(
    path: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    ema: dict[str, Tensor] | None = None,
) -> None:
    part = path.with_suffix(".part")
    torch.save(
        {
            "step": step,
            "modules": {name: m.state_dict() for name, m in modules.items()},
            "optimizers": [o.state_dict() for o in optimizers],
            "ema": ema,
        },
        part,
    )
    part.replace(path)


def _load(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    ema: dict[str, Tensor] | None = None,
) -> int:
    """Take up a checkpoint; returns the number of finished steps, 0 without one."""
    if not path.exists():
        return 0
    kept = torch.load(path, map_location="cpu", weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(kept["modules"][name])
    for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    if ema is not None:
        for name, value in kept["ema"].items():
            ema[name].copy_(value)
    return int(kept["step"])
