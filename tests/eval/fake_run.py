"""A run directory that is valid, and was never generated: for tests of what reads one."""

from dataclasses import replace

import torch

from dit_accel.eval.samples import (
    DENSE,
    Density,
    Flops,
    Prompt,
    Sample,
    Seconds,
    Settings,
    Variant,
)
from dit_accel.eval.store import Store

VARIANTS = (
    Variant(DENSE, "dense", "dense"),
    Variant("dense-math", "dense", "floor", backend="_native_math"),
    Variant(
        "pisa-0.15",
        "pisa",
        "method",
        given={"density": 0.15},
        options={"density": 0.15, "block_size": 16, "rest": "taylor"},
    ),
    Variant(
        "pisa-0.25",
        "pisa",
        "method",
        given={"density": 0.25},
        options={"density": 0.25, "block_size": 16, "rest": "taylor"},
    ),
    Variant("psa", "psa", "method", options={"block_q": 16, "block_k": 16}),
)
# error and speed of each, relative to dense
_LOOKS = {
    "dense": (0.0, 1.0, 1.0),
    "dense-math": (0.004, 1.0, 1.3),
    "pisa-0.15": (0.05, 0.148, 0.6),
    "pisa-0.25": (0.03, 0.25, 0.7),
    "psa": (0.09, 0.11, 0.5),
}
PROMPTS = (
    "a red circle moves right over a blue background",
    "a green star spins over a black background",
    "a white square bounces over a striped brown background",
)


def settings(prompts=PROMPTS, seeds=(0,), variants=VARIANTS, frames=5, size=32, **change):
    """Settings of a run of `tiny-wan`."""
    made = Settings(
        model="tiny-wan",
        fingerprint="0" * 64,
        variants=tuple(variants),
        prompts=tuple(Prompt(i, text) for i, text in enumerate(prompts)),
        seeds=tuple(seeds),
        steps=4,
        guidance=6.0,
        height=size,
        width=size,
        frames=frames,
        negative_prompt=None,
        fps=8,
        dtype="float32",
        device="cpu",
    )
    return replace(made, **change)


def fake_sample(chosen, key):
    """``(sample, frames, latents, steps)`` of one key of a run."""
    variant = chosen.variant(key.variant)
    error, density, speed = _LOOKS.get(key.variant, (0.05, 0.15, 0.6))
    prompt = chosen.prompts[key.prompt]
    generator = torch.Generator().manual_seed(1000 * key.prompt + key.seed)
    clip = torch.rand(chosen.frames, 3, chosen.height, chosen.width, generator=generator)
    latents = torch.randn(16, chosen.frames, 4, 4, generator=generator)
    own = torch.Generator().manual_seed(hash_of(key.variant))
    clip = (clip + error * torch.randn(clip.shape, generator=own)).clamp(0, 1)
    latents = latents + error * torch.randn(latents.shape, generator=own)
    jitter = float(torch.rand((), generator=own)) * 0.02
    steps = tuple(0.2 * speed + jitter + 0.001 * i for i in range(chosen.steps))
    attention = 0.12 * speed * chosen.steps
    sample = Sample(
        variant=key.variant,
        method=variant.method,
        options=variant.options,
        prompt=key.prompt,
        text=prompt.text,
        seed=key.seed,
        media="",
        shape=(0, 0, 0, 0),
        seconds=Seconds(sum(steps) + 0.3, steps, 0.25),
        density=Density(
            density,
            dict.fromkeys(range(chosen.steps), density),
            dict.fromkeys(range(6), density),
        ),
        attention_seconds=dict.fromkeys(range(6), attention / 6),
        breakdown={
            "layout": 0.02 * attention if density < 1 else 0.0,
            "route": 0.1 * attention if density < 1 else 0.0,
            "attend": 0.8 * attention,
            "merge": 0.0,
            "linear": 0.05 * chosen.steps,
            "other": 0.02 * chosen.steps,
        },
        peak_bytes=2**28,
        flops=Flops(density * 4e9, 4e9, 6e9, *(((1 - density) * 1e8,) * 3)),
        absent={},
        device="cpu",
    )
    return sample, clip, latents, torch.stack([latents + i for i in range(chosen.steps)])


def hash_of(text):
    """A number from a text, the same in every process."""
    return sum((i + 1) * byte for i, byte in enumerate(text.encode()))


def fake_run(root, chosen=None, *, skip=()):
    """Write a run; ``skip`` are names (variant, prompt) of samples to leave out."""
    chosen = chosen or settings()
    store = Store(root)
    store.claim(chosen, ("dit-accel", "eval", "run", "--out", str(root)))
    for key in chosen.every_key():
        if (key.variant, key.prompt) in skip:
            continue
        sample, frames, latents, steps = fake_sample(chosen, key)
        store.put(sample, frames, latents, chosen.fps, steps if chosen.latents else None)
    return store
