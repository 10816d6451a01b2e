"""Synthetic queries, keys and values that attend as video does, from a seed.

Smooth random fields over the grid, alike in queries and keys, normalised as RMS norms do and turned
by Wan's rotary embedding. Nothing of them was trained, so what holds on these and on a model's own
is more than a habit of that model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.eval.calls import Call, solved
from dit_accel.pipelines.wan import rotate
from dit_accel.types import Context, Geometry

BRANCHES = ("cond", "uncond")


def smooth(
    grid: tuple[int, int, int], heads: int, depth: int, length: float, generator: torch.Generator
) -> Tensor:
    """Gaussian random fields of unit variance, periodic over the grid.

    Args:
        grid: frames, rows, columns.
        heads, depth: how many independent ones, ``H · D``.
        length: standard deviation, in cells, of the Gaussian that white noise is smoothed with.
        generator: of the noise.

    Returns:
        fp32 ``[1, H, L, D]``, row-major over the grid.
    """
    noise = torch.randn(heads, depth, *grid, generator=generator)
    axes = [torch.fft.fftfreq(n) for n in grid]
    t, h, w = torch.meshgrid(*axes, indexing="ij")
    square = t.square() + h.square() + w.square()
    low = torch.fft.ifftn(
        torch.fft.fftn(noise, dim=(2, 3, 4)) * torch.exp(-2 * (math.pi * length) ** 2 * square),
        dim=(2, 3, 4),
    ).real
    low = low / low.std(dim=(2, 3, 4), keepdim=True).clamp(min=1e-12)
    return low.flatten(2).mT.unsqueeze(0).contiguous()


def synthetic(
    grid: tuple[int, int, int] = (5, 16, 16),
    heads: int = 4,
    depth: int = 64,
    steps: int = 4,
    *,
    length: float = 2.0,
    alike: float = 0.6,
    noise: float = 0.3,
    sharpness: float = 1.3,
    seed: int = 0,
    device: str = "cpu",
) -> Iterator[list[Call]]:
    """Calls of one layer, step by step, the two guidance branches of a step together.

    The fields of a step are those of the step before, turned a little towards others; the branches
    share nine tenths of theirs.

    Args:
        grid, heads, depth: ``(T, H, W)``, ``H``, and ``D``, a multiple of 2 of at least 6.
        steps: how many.
        length: of the fields, in cells.
        alike: share of a key's amplitude that is the query's own field.
        noise: white noise beside the fields, as a share of their amplitude.
        sharpness: root mean square of queries and keys; logits grow with its square.
        seed: of everything; drawn on the host, so that every device has the same.
        device: that the calls lie on.

    Raises:
        InputError: an argument does not fit.
    """
    if depth < 6 or depth % 2:
        raise InputError(f"depth: expected an even number of at least 6, got {depth}")
    if steps < 1:
        raise InputError(f"steps: expected a positive integer, got {steps}")
    generator = torch.Generator().manual_seed(seed)
    angles = _rotary(grid, depth)

    def draw(scale: float = length) -> Tensor:
        return smooth(grid, heads, depth, scale, generator)

    def embed(x: Tensor) -> Tensor:
        x = x + noise * torch.randn(x.shape, generator=generator)
        x = x * (sharpness / x.square().mean(-1, keepdim=True).sqrt())
        return rotate(x.transpose(1, 2), *angles).transpose(1, 2)

    ends = [[draw() for _ in range(3)] for _ in range(2)]
    apart = [[draw() for _ in range(3)] for _ in BRANCHES]
    for step in range(steps):
        turn = 0.5 * math.pi * step / max(20, steps)
        calls = []
        for branch, own in zip(BRANCHES, apart, strict=True):
            shared, key, value = (
                math.cos(turn) * a + math.sin(turn) * b + 0.1 * c
                for a, b, c in zip(*ends, own, strict=True)
            )
            key = alike * shared + math.sqrt(1 - alike**2) * key
            value = value + noise * torch.randn(value.shape, generator=generator)
            ctx = Context(
                Geometry(grid), step=step, num_steps=steps, layer=0, num_layers=1, branch=branch
            )
            q, k, v = (x.to(device) for x in (embed(shared), embed(key), value))
            calls.append(solved(q, k, v, ctx))
        yield calls


def _rotary(grid: tuple[int, int, int], depth: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[1, L, 1, D]`` of Wan's embedding."""
    made = WanRotaryPosEmbed(depth, (1, 1, 1), max(grid))
    cos, sin = made(torch.zeros(1, 1, *grid))
    return cos.float(), sin.float()
