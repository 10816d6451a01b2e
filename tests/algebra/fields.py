"""Structured attention without weights: smooth random fields under rotary embedding.

What a trained video model's self-attention looks like in short: content that changes smoothly over
the grid, and positions that turn pairs of channels, by a third of the channels for each axis, as in
Wan.
"""

import torch


def rotary(place, depth, base=100.0):
    """Angles ``[L, D/2]`` of cells ``[L, 3]``: the channel pairs are shared out over the axes."""
    pairs = depth // 2
    shares = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return torch.cat(
        [
            place[:, axis : axis + 1] * base ** -(torch.arange(n, dtype=place.dtype) / n)
            for axis, n in enumerate(shares)
        ],
        -1,
    )


def turn(x, angles):
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def smooth(place, heads, channels, cells, generator):
    """``[H, L, C]``: unit-variance random waves, each of some ``cells`` from crest to crest."""
    waves = torch.randn(heads, 3, channels, generator=generator, dtype=place.dtype)
    phases = torch.rand(heads, 1, channels, generator=generator, dtype=place.dtype)
    return 2**0.5 * ((place @ waves) / cells + phases).mul(2 * torch.pi).cos()


def make(grid, heads=2, depth=32, *, seed=0, cells=16.0, gain=1.2, noise=0.2, drift=0.0):
    """q, k, v: ``[1, H, L, D]`` in fp32.

    Queries and keys see the same content through different maps that mostly agree, so that like
    attends to like. ``drift`` mixes in as much of another field: a later denoising step.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.arange(n, dtype=torch.float64) for n in grid]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)

    # flat and textured places: the noise varies smoothly too, up to fourfold either way
    texture = noise * smooth(place, heads, 1, 2 * cells, generator).exp()

    def rough(x):
        return x + texture * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    content = smooth(place, heads, depth, cells, generator)
    own = [smooth(place, heads, depth, cells, generator) for _ in range(3)]
    made = [rough(0.8 * content + 0.6 * own[0]), rough(0.8 * content + 0.6 * own[1]), rough(own[2])]
    other = [smooth(place, heads, depth, cells, generator) for _ in range(3)]
    made = [x + drift * y for x, y in zip(made, other, strict=True)]
    angles = rotary(place, depth)
    q, k = (gain * turn(x, angles) for x in made[:2])
    return tuple(x.float().unsqueeze(0) for x in (q, k, made[2]))
