"""Layouts: in what order the tokens stand, and where that order is cut into blocks.

A layout is a frozen dataclass, called as ``layout(q, k, v, ctx, scale) -> Blocked``. Tokens are
never moved: a layout only says which tokens make a block, and kernels gather and scatter. Text
tokens come last in every order, in the model's own order, in blocks of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Final, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dit_accel.curve import gilbert_order
from dit_accel.errors import InputError
from dit_accel.kernels.block_summary import block_mean, block_summary
from dit_accel.types import Blocks, Context, Geometry, Grid, Summary

TEXT_BLOCK = 64
"""Tokens in a text block, where a layout has no block size of its own."""

Statistic = Literal["k_var", "cov"]
"""A part of a summary that is computed only if something asks for it."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """Queries, keys and values of an attention call, with their blocks.

    Attributes:
        q, k, v: ``[B, H, L, D]``, in the model's order.
        queries, keys: the blocks; the two may differ.
        geometry: what the tokens are.
        scale: of the logits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    queries: Blocks
    keys: Blocks
    geometry: Geometry
    scale: float
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def summary(self, *parts: Statistic) -> Summary:
        """Statistics of the key blocks: computed once, and shared by route and rest.

        Args:
            parts: ``"k_var"`` and ``"cov"`` (``cov_sum`` and ``cov_norm``), when wanted. Ask for
                everything at once: a part that is missing later costs a second pass.
        """
        known: Summary | None = self._cache.get("summary")
        need_var = "k_var" in parts and (known is None or known.k_var is None)
        need_cov = "cov" in parts and (known is None or known.cov_sum is None)
        if known is not None and not (need_var or need_cov):
            return known
        found = block_summary(
            self.k,
            self.v,
            perm=self.keys.perm,
            offsets=self.keys.offsets,
            num_video=self.keys.num_video,
            key_valid=self.geometry.key_valid,
            k_var=need_var,
            cov=need_cov,
            longest=self.keys.longest,
        )
        if known is None:
            known = Summary(found.count, found.k_mean, found.v_mean)
        if need_var:
            known = replace(known, k_var=found.k_var)
        if need_cov:
            known = replace(known, cov_sum=found.cov_sum, cov_norm=found.cov_norm)
        self._cache["summary"] = known
        return known

    def key_mean(self) -> Tensor:
        """``k̄_j`` alone, as `summary` has it: fp32 (fp64 for fp64) ``[B, H, Nk, D]``. Cached."""
        known: Summary | None = self._cache.get("summary")
        if known is not None:
            return known.k_mean
        return self._mean("key_mean", self.k, self.keys, self.geometry.key_valid)

    def query_mean(self) -> Tensor:
        """``q̄_i``: fp32 (fp64 for fp64) ``[B, H, Nq, D]``, zero for an empty block. Cached."""
        return self._mean("query_mean", self.q, self.queries, None)

    def _mean(self, name: str, x: Tensor, blocks: Blocks, valid: Tensor | None) -> Tensor:
        if name not in self._cache:
            self._cache[name] = block_mean(
                x, perm=blocks.perm, offsets=blocks.offsets, valid=valid, longest=blocks.longest
            )
        mean: Tensor = self._cache[name]
        return mean


@runtime_checkable
class Layout(Protocol):
    """Orders the tokens and cuts the order into blocks."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None
    ) -> Blocked: ...


def default_scale(q: Tensor, scale: float | None) -> float:
    """``scale``, or ``D ** -0.5``."""
    return float(scale) if scale is not None else q.shape[-1] ** -0.5


def cut(length: int, block_size: int) -> list[int]:
    """Sizes of the blocks of ``length`` tokens cut every ``block_size``; the last may be short."""
    full, tail = divmod(length, block_size)
    return [block_size] * full + [tail] * (tail > 0)


def join_text(
    cells: Tensor,
    sizes: list[int],
    text_span: tuple[int, int],
    text_block: int,
    device: torch.device,
) -> Blocks:
    """Blocks over video cells, with the text appended in blocks of its own.

    Args:
        cells: int64 ``[V]``, video tokens by row-major cell index, in the layout's order.
        sizes: sizes of the video blocks.
        text_span: ``(start, stop)`` of the text in the sequence.
        text_block: size of a text block.
        device: where the result lives.
    """
    start, stop = text_span
    tokens = torch.where(cells < start, cells, cells + (stop - start))
    perm = torch.cat([tokens, torch.arange(start, stop)])
    every = [*sizes, *cut(stop - start, text_block)]
    offsets = torch.tensor([0, *every]).cumsum(0).to(torch.int32)
    return Blocks(
        perm.to(device).view(1, 1, -1), offsets.to(device).view(1, 1, -1), len(sizes), max(every)
    )


# What a layout makes of a grid: the cells in order, and the sizes of the blocks.
_Cells = Callable[[Grid], tuple[Tensor, list[int]]]


@lru_cache(maxsize=64)
def _grid_blocks(
    grids: tuple[tuple[Grid, _Cells], ...],
    text_span: tuple[int, int],
    text_block: int,
    device: torch.device,
) -> Blocks:
    """Blocks that depend on the grids alone, kept for the 64 used last. None spans two grids."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used outside
        orders: list[Tensor] = []
        sizes: list[int] = []
        first = 0
        for grid, cells in grids:
            order, some = cells(grid)
            orders.append(order + first)
            sizes += some
            first += len(order)
        return join_text(torch.cat(orders), sizes, text_span, text_block, device)


def _check_sizes(owner: object, **sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise InputError(
                f"{type(owner).__name__}: {name}: expected a positive integer, got {size!r}"
            )


def _check_tile(owner: object, name: str, tile: tuple[int, ...], length: int) -> None:
    if not isinstance(tile, tuple) or len(tile) != length:
        raise InputError(
            f"{type(owner).__name__}: {name}: expected {length} positive integers, got {tile!r}"
        )
    _check_sizes(owner, **{f"{name}[{i}]": size for i, size in enumerate(tile)})


@dataclass(frozen=True, slots=True)
class _Cut:
    """A fixed order of the cells, cut every ``block_size`` tokens."""

    curve: bool
    block_size: int

    def __call__(self, grid: Grid) -> tuple[Tensor, list[int]]:
        order = gilbert_order(grid) if self.curve else torch.arange(math.prod(grid))
        return order, cut(math.prod(grid), self.block_size)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Cells by tile, row-major over the tiles and inside each; ragged at the far edges."""

    tile: tuple[int, int, int]

    def __call__(self, grid: Grid) -> tuple[Tensor, list[int]]:
        ids = torch.zeros(grid, dtype=torch.int64)
        for axis, (size, step) in enumerate(zip(grid, self.tile, strict=True)):
            shape = [1, 1, 1]
            shape[axis] = size
            ids = ids * -(-size // step) + (torch.arange(size) // step).view(shape)
        ids = ids.flatten()
        return ids.argsort(stable=True), ids.bincount().tolist()


def _every(where: Geometry, cells: _Cells) -> tuple[tuple[Grid, _Cells], ...]:
    return tuple((grid, cells) for grid in where.grids)


def _blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: Context,
    scale: float | None,
    queries: Blocks,
    keys: Blocks,
) -> Blocked:
    return Blocked(q, k, v, queries, keys, ctx.geometry, default_scale(q, scale))


@dataclass(frozen=True, slots=True)
class _Curve:
    """What `Raster` and `Gilbert` share: a fixed order, cut evenly.

    Attributes:
        block_size: tokens in a key block, and in a text block.
        query_block_size: tokens in a query block; as ``block_size`` by default.
    """

    block_size: int = 64
    query_block_size: int | None = None

    def __post_init__(self) -> None:
        _check_sizes(self, block_size=self.block_size, query_block_size=self.query_block_size)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None
    ) -> Blocked:
        where, curve = ctx.geometry, isinstance(self, Gilbert)
        keys, queries = (
            _grid_blocks(_every(where, _Cut(curve, size)), where.text_span, size, q.device)
            for size in (self.block_size, self.query_block_size or self.block_size)
        )
        return _blocked(q, k, v, ctx, scale, queries, keys)


@dataclass(frozen=True, slots=True)
class Raster(_Curve):
    """The model's own ``(t, h, w)`` row-major order, cut every ``block_size`` tokens."""


@dataclass(frozen=True, slots=True)
class Gilbert(_Curve):
    """The order of a generalised Hilbert curve over the grid, cut every ``block_size`` tokens.

    Any grid; the layout of PSA (arXiv 2512.04025), and a good one for every block method.
    """


@dataclass(frozen=True, slots=True)
class Tile3D:
    """``(t, h, w)`` tiles; ragged at the edges of grids that the tile does not divide.

    Attributes:
        tile: cells of a tile, by axis. Text is cut into blocks of as many tokens.
    """

    tile: tuple[int, int, int] = (4, 4, 4)

    def __post_init__(self) -> None:
        _check_tile(self, "tile", self.tile, 3)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None
    ) -> Blocked:
        where, text_block = ctx.geometry, math.prod(self.tile)
        tiles = _every(where, _Tiles(self.tile))
        blocks = _grid_blocks(tiles, where.text_span, text_block, q.device)
        return _blocked(q, k, v, ctx, scale, blocks, blocks)


@dataclass(frozen=True, slots=True)
class Cyclic:
    """VMoBA's layouts (arXiv 2506.23858): time, space and space-time in turn, by layer.

    Layer ``3m`` cuts time into chunks of frames, layer ``3m + 1`` space into windows through all
    frames, layer ``3m + 2`` the grid into boxes. Ragged where sizes do not divide.

    Attributes:
        frames: frames of a time chunk.
        window: rows and columns of a space window.
        box: frames, rows and columns of a box.

    The defaults are the paper's for Wan 1.3B at 480p (20 x 30 x 52 latent cells).
    """

    frames: int = 2
    window: tuple[int, int] = (3, 4)
    box: tuple[int, int, int] = (4, 6, 4)

    period: ClassVar[int] = 3
    """Layers that are treated in turn."""

    def __post_init__(self) -> None:
        _check_sizes(self, frames=self.frames)
        _check_tile(self, "window", self.window, 2)
        _check_tile(self, "box", self.box, 3)

    def tile(self, grid: tuple[int, int, int], layer: int) -> tuple[int, int, int]:
        """The tile that this layer cuts the grid into."""
        whole_frames, rows, columns = grid
        return (
            (self.frames, rows, columns),
            (whole_frames, *self.window),
            self.box,
        )[layer % self.period]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None
    ) -> Blocked:
        where = ctx.geometry
        tiles = tuple((grid, _Tiles(self.tile(grid, ctx.layer))) for grid in where.grids)
        blocks = _grid_blocks(tiles, where.text_span, TEXT_BLOCK, q.device)
        return _blocked(q, k, v, ctx, scale, blocks, blocks)


LAYOUTS: Final = {"raster": Raster, "gilbert": Gilbert, "tile3d": Tile3D, "cyclic": Cyclic}
"""The layouts that depend on the grid alone, by name."""


def tile_of(block_size: int) -> tuple[int, int, int]:
    """The tile of ``block_size`` cells that is nearest to a cube, frames never the longest side.

    >>> tile_of(64), tile_of(128), tile_of(32)
    ((4, 4, 4), (4, 4, 8), (2, 4, 4))
    """
    _check_sizes(Tile3D(), block_size=block_size)
    tiles = [
        (t, h, block_size // (t * h))
        for t in range(1, block_size + 1)
        if block_size % t == 0
        for h in range(t, block_size // t + 1)
        if block_size // t % h == 0 and block_size // (t * h) >= h
    ]
    return min(tiles, key=lambda tile: (sum(tile), tile))
