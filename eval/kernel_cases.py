"""What `bench_kernels` times: calls of operations on inputs that attend as video does.

No case needs diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.cluster import KMeans
from dit_accel.error_route import ErrorAware
from dit_accel.kernels.block_importance import block_importance
from dit_accel.kernels.dense_attention import dense_attention, why_not
from dit_accel.kernels.error_probe import error_probe
from dit_accel.kernels.kmeans import kmeans
from dit_accel.kernels.label_order import label_order
from dit_accel.kernels.pair_count import pair_count
from dit_accel.kernels.token_attention import token_attention
from dit_accel.kernels.token_select import token_select
from dit_accel.kernels.words import Words
from dit_accel.layout import Blocked, Cyclic, Gilbert, Layout
from dit_accel.pyramid import Pyramid
from dit_accel.rest import Centroid, Drop
from dit_accel.state import State
from dit_accel.token_route import Gate, block_of
from dit_accel.types import Context, Geometry


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's self-attention: latent grid, text tokens after it, heads and their size."""

    grid: tuple[int, int, int]
    heads: int
    text: int = 0
    head_dim: int = 128

    @property
    def tokens(self) -> int:
        return math.prod(self.grid) + self.text

    @property
    def context(self) -> Context:
        video = math.prod(self.grid)
        text = slice(video, video + self.text) if self.text else None
        return Context(Geometry(self.grid, text))


SHAPES = {
    "wan14b": Shape((21, 45, 80), 40),
    "wan1.3b": Shape((21, 30, 52), 12),
    "hunyuan": Shape((33, 45, 80), 24, 256),
    "flux": Shape((1, 64, 64), 24, 512),
    "small": Shape((3, 6, 10), 2, 12, 64),
}
"""Wan 2.1 at 720p and 480p, HunyuanVideo at 720p, FLUX.1 at 1024 x 1024, and one for tests."""


@dataclass(frozen=True, slots=True)
class Case:
    """A call to time.

    Attributes:
        name: what it is.
        call: it.
        flops, bytes: what the operation itself cannot do without: products counted twice, inputs
            read once and outputs written once.
        note: measured beside it, such as a density.
    """

    name: str
    call: Callable[[], Any]
    flops: float
    bytes: float
    note: str = ""


STRENGTHS = {"sharp": 1.6, "broad": 0.8}
"""Amplitudes of queries and keys, by name: logits go with their square, and attention is the more
concentrated the larger they are."""


def inputs(
    shape: Shape, dtype: torch.dtype, device: str, seed: int = 0, strength: str = "sharp"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[1, H, L, D]``: waves over the grid and noise, by head.

    Made head by head where they are used, since in fp32 and on the host they would take minutes.
    """
    generator = torch.Generator(device).manual_seed(seed)
    axes = [torch.linspace(-1, 1, n, device=device) if n > 1 else torch.zeros(1, device=device)
            for n in shape.grid]  # fmt: skip
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    made = [
        torch.empty(1, shape.heads, shape.tokens, shape.head_dim, dtype=dtype, device=device)
        for _ in range(3)
    ]
    for h in range(shape.heads):
        waves, phases = 3 * noise(3, shape.head_dim), 6.28 * noise(1, shape.head_dim)
        others = 3 * noise(3, shape.head_dim)
        sizes = (STRENGTHS[strength], STRENGTHS[strength], 1.0)
        for x, size, some in zip(made, sizes, (waves, waves, others), strict=True):
            field = (place @ some + phases).sin_() + 0.3 * noise(place.shape[0], shape.head_dim)
            x[0, h, : place.shape[0]] = size * field
            x[0, h, place.shape[0] :] = noise(shape.text, shape.head_dim)
    return made[0], made[1], made[2]


def _size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _blocked(shape: Shape, layout: Layout, parts: tuple[Tensor, ...], layer: int = 0) -> Blocked:
    where = Context(shape.context.geometry, layer=layer)
    return layout(parts[0], parts[1], parts[2], where)


def dense_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """Dense attention by torch's backends, and by FlashAttention-3 where it is installed."""
    q, k, v = parts
    flops = 4 * shape.head_dim * shape.heads * shape.tokens**2
    for name, backend in (
        ("cuDNN", "cudnn"),
        ("FlashAttention", "flash"),
        ("FlashAttention-3", "flash3"),
    ):
        if why_not(backend, q, k, v) is None or backend != "flash3":

            def call(backend: str = backend) -> Tensor:
                return dense_attention(q, k, v, backend=backend)

            yield Case(name, call, flops, _size(q, k, v, q))


def error_probe_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """Clusters of the paper's number, and blocks of 64 keys and 128 queries."""
    clusters = KMeans(first_iterations=2)
    for name, layout in (("clusters", clusters), ("blocks", Gilbert(64, 128))):
        blocked = _blocked(shape, layout, parts)
        columns = blocked.keys.num_video
        queries = blocked.query_mean()[:, :, : blocked.queries.num_video].contiguous()
        weight = Centroid().log_weight(blocked, queries)[..., :columns].contiguous()

        def call(
            blocked: Blocked = blocked, queries: Tensor = queries, weight: Tensor = weight
        ) -> Tensor:
            return error_probe(
                queries,
                blocked.k,
                weight,
                perm=blocked.keys.perm,
                offsets=blocked.keys.offsets,
                num_blocks=weight.shape[-1],
                scale=blocked.scale,
            )

        flops = 2 * queries.numel() * (shape.tokens - shape.text)
        least = _size(blocked.k, queries, weight, weight, blocked.keys.perm)
        sizes = f"{queries.shape[2]} x {columns}"
        yield Case(f"{name} {sizes}", call, flops, least)

        def route(blocked: Blocked = blocked) -> Any:
            return ErrorAware()(blocked, Centroid(), shape.context)

        yield Case(f"{name} {sizes}, whole route", route, flops, least)


def kmeans_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """Warm starts with two iterations, and the steps they are made of."""
    video = shape.tokens - shape.text
    x = parts[1][:, :, :video]
    count = max(2, round(video / 75.6))
    labels, start = kmeans(x, count, iterations=2)
    once = 2 * x.numel() * count
    for backend in ("triton", "flash_kmeans"):
        for iterations in (2, 0):

            def call(backend: str = backend, iterations: int = iterations) -> Any:
                return kmeans(x, count, iterations=iterations, start=start, backend=backend)

            yield Case(
                f"{backend}, C={count}, {iterations} iterations",
                call,
                once * (iterations + 1),
                _size(x) * (2 * iterations + 1),
            )
    yield Case("order of the labels", lambda: label_order(labels, count), 0, 2 * _size(labels))
    state = State()
    where = Context(shape.context.geometry, state=state)
    layout = KMeans()
    q, k, v = parts
    layout(q, k, v, where)
    yield Case(
        "whole layout, warm",
        lambda: layout(q, k, v, where),
        3 * once * 1.3,
        10 * _size(x),
    )


def block_importance_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """A quarter of the tokens of blocks of 128 queries and 64 keys."""
    blocked = _blocked(shape, Gilbert(64, 128), parts)
    route = Pyramid()
    rows, columns = blocked.queries.num_video, blocked.keys.num_video
    (q_tokens, q_bounds), (k_tokens, k_bounds) = (
        route._sampled(blocks.perm, blocks.offsets[..., : blocks.num_video + 1], blocks.longest)
        for blocks in (blocked.queries, blocked.keys)
    )
    sampled = (shape.tokens - shape.text) / 4
    flops = 2 * shape.heads * shape.head_dim * sampled**2
    least = _size(*parts[:2]) / 4 + 4 * shape.heads * rows * columns

    def call() -> Tensor:
        return block_importance(
            blocked.q,
            blocked.k,
            q_tokens=q_tokens,
            q_bounds=q_bounds,
            k_tokens=k_tokens,
            k_bounds=k_bounds,
            scale=blocked.scale,
            k_longest=16,
        )

    yield Case(f"{rows} x {columns}", call, flops, least)
    yield Case("whole route", lambda: route(blocked, Drop(), shape.context), flops, least)


def _token_layouts(shape: Shape) -> Iterator[tuple[str, Layout, int]]:
    """About 96 blocks, and VMoBA's layouts by layer."""
    yield "96 blocks", Gilbert(-(-math.prod(shape.grid) // 96)), 0
    for layer, name in enumerate(("time", "space", "boxes")):
        yield name, Cyclic(), layer


def token_select_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """The paper's threshold, among all pairs of a head."""
    for name, layout, layer in _token_layouts(shape):
        blocked = _blocked(shape, layout, parts, layer)
        mean, full = blocked.summary().k_mean, blocked.summary().count > 0
        own = block_of(blocked.keys.perm, blocked.keys.offsets)
        pairs = shape.heads * shape.tokens * mean.shape[2]

        def call(
            blocked: Blocked = blocked, mean: Tensor = mean, own: Tensor = own, full: Tensor = full
        ) -> Words:
            return token_select(
                blocked.q,
                mean,
                own,
                full,
                num_video=blocked.keys.num_video,
                text_span=blocked.geometry.text_span,
                threshold=0.25,
            )

        yield Case(
            f"{name}, N={mean.shape[2]}",
            call,
            2 * shape.head_dim * pairs,
            _size(blocked.q) + pairs / 8,
        )


_SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_stages": 2},
    {"num_stages": 2, "maxnreg": 128},
    {"num_stages": 4},
    {"BN": 128, "num_stages": 2},
    {"BM": 64, "num_warps": 4},
    {"G": 1},
    {"G": 2},
    {"G": 4},
)
"""Launches of token attention beside the usual one."""


def token_attention_settings(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """Token attention launched in other ways, on a few large blocks and on many small ones."""
    from dit_accel.kernels.token_attention import triton

    for name, layout, layer in _token_layouts(shape):
        if name == "time":
            continue
        blocked = _blocked(shape, layout, parts, layer)
        select = Gate()(blocked, Drop(), shape.context).chosen
        pairs = _exact_pairs(select, blocked)
        for setting in _SETTINGS:

            def call(
                blocked: Blocked = blocked,
                select: Tensor | Words = select,
                setting: dict[str, Any] = setting,
            ) -> Any:
                return triton.token_attention(
                    blocked.q,
                    blocked.k,
                    blocked.v,
                    select,
                    blocked.keys.perm,
                    blocked.keys.offsets,
                    None,
                    blocked.scale,
                    None,
                    setting,
                )

            label = ", ".join(f"{key}={value}" for key, value in setting.items())
            yield Case(f"{name}: {label}", call, 4 * shape.head_dim * pairs, _size(*parts))


def _exact_pairs(select: Tensor | Words, blocked: Blocked) -> float:
    return float(pair_count(select, blocked.keys.sizes)[0].sum())


def token_attention_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """What the gate selects at the paper's threshold, and as much drawn at random."""
    for name, layout, layer in _token_layouts(shape):
        blocked = _blocked(shape, layout, parts, layer)
        chosen = Gate()(blocked, Drop(), shape.context).chosen
        plans: list[tuple[str, Tensor | Words]] = [(name, chosen)]
        if name == "96 blocks":
            drawn = torch.rand(chosen.shape[2:], device=blocked.q.device) < 0.25
            plans.append((f"{name} at random", Words.of(drawn[None, None])))
        for label, select in plans:
            pairs = _exact_pairs(select, blocked)

            def call(blocked: Blocked = blocked, select: Tensor | Words = select) -> Any:
                return token_attention(
                    blocked.q,
                    blocked.k,
                    blocked.v,
                    select,
                    k_perm=blocked.keys.perm,
                    k_offsets=blocked.keys.offsets,
                )

            density = pairs / (shape.heads * shape.tokens**2)
            yield Case(
                f"{label}, N={select.shape[3]}",
                call,
                4 * shape.head_dim * pairs,
                _size(*parts[:3], parts[0]) + math.prod(select.shape) / 8,
                note=f"density {density:.3f}",
            )


CASES: dict[str, Callable[[Shape, tuple[Tensor, ...]], Iterator[Case]]] = {
    "dense": dense_cases,
    "error_probe": error_probe_cases,
    "kmeans": kmeans_cases,
    "block_importance": block_importance_cases,
    "gate": token_select_cases,
    "token_attention": token_attention_cases,
    "token_attention_settings": token_attention_settings,
}
"""Cases by operation."""
