"""The layout of SVG2 and SVG-EAR: blocks of tokens that mean alike, wherever they stand.

Queries and keys are clustered by themselves, by batch element and head (arXiv 2505.18875,
2603.08982).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.kernels.block_summary import block_mean
from dit_accel.kernels.kmeans import bisected, kmeans
from dit_accel.kernels.label_order import label_order
from dit_accel.kernels.order import valid_order
from dit_accel.layout import TEXT_BLOCK, Blocked, default_scale
from dit_accel.types import Blocks, Context, Geometry

TOKENS, QUERY_CLUSTERS, KEY_CLUSTERS = 75_600, 300, 1000
"""The paper's numbers of clusters, and the sequence they are for (SVG-EAR, Wan at 720p)."""


@dataclass(frozen=True, slots=True)
class KMeans:
    """Euclidean k-means of queries and of keys.

    The first call of a layer and guidance branch starts from tokens; later ones from where the call
    before ended, since little moves from one denoising step to the next. An iteration gives every
    token to its nearest centroid, and then takes the means: the clusters are those of the last
    iteration, and its means are where the next call starts, as in the public code, which takes two
    iterations in a later call. The first call also puts clusters that are alike beside each other,
    and later ones leave them there.

    Attributes:
        q_clusters, k_clusters: how many; by default as many as keep the clusters' mean size what it
            is in the paper, 252 queries and 75.6 keys. Never more than tokens.
        first_iterations, next_iterations: of the first call, and of each later one; the public code
            takes 2 in later ones, which was not measurably better.
        share_branches: start from the centroids of the call before whatever its guidance branch, as
            the public code of SVG2 does to save memory.
        seed: of the tokens to start from.
    """

    q_clusters: int | None = None
    k_clusters: int | None = None
    first_iterations: int = 50
    next_iterations: int = 1
    share_branches: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("q_clusters", "k_clusters"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"KMeans: {name}: expected a positive integer, got {value!r}")
        for name in ("first_iterations", "next_iterations"):
            if getattr(self, name) < 0:
                raise InputError(f"KMeans: {name}: expected 0 or more, got {getattr(self, name)}")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None
    ) -> Blocked:
        video = ctx.geometry.num_video
        queries = min(video, self.q_clusters or -(-video * QUERY_CLUSTERS // TOKENS))
        keys = min(video, self.k_clusters or -(-video * KEY_CLUSTERS // TOKENS))
        memory = ctx.memory
        if self.share_branches and ctx.state is not None:
            memory = ctx.state.slot(ctx.layer, "")
        where = ctx.geometry
        q_blocks, q_centres = self._partition(q, queries, where, memory.get("kmeans queries"))
        k_blocks, k_centres = self._partition(k, keys, where, memory.get("kmeans keys"))
        blocked = Blocked(q, k, v, q_blocks, k_blocks, where, default_scale(q, scale))
        known = memory.get("kmeans queries") is not None
        if self.next_iterations if known else self.first_iterations:
            # the means that end an iteration: route and rest want them as well
            q_centres = _moved(q_centres, *_query_means(blocked))
            summary = blocked.summary()
            k_centres = _moved(k_centres, summary.k_mean, summary.count)
        memory["kmeans queries"], memory["kmeans keys"] = q_centres, k_centres
        return blocked

    def _partition(
        self, x: Tensor, clusters: int, where: Geometry, known: Tensor | None
    ) -> tuple[Blocks, Tensor]:
        """Clusters, and the centroids that their tokens are nearest to."""
        start, stop = where.text_span
        valid = where.key_valid
        if stop == x.shape[2]:
            x, valid = x[:, :, :start], None if valid is None else valid[:, :start]
        elif stop > start:
            x = torch.cat([x[:, :, :start], x[:, :, stop:]], 2)
            valid = None if valid is None else torch.cat([valid[:, :start], valid[:, stop:]], 1)
        if known is not None and known.shape != (*x.shape[:2], clusters, x.shape[3]):
            known = None  # another resolution, or another batch
        iterations = self.first_iterations if known is None else self.next_iterations
        labels, centroids = kmeans(
            x,
            clusters,
            iterations=max(0, iterations - 1),
            start=known,
            valid=valid,
            seed=self.seed,
        )
        if known is None:
            order = bisected(centroids)
            labels = order.argsort(-1).gather(-1, labels.long())
            centroids = centroids.gather(2, order.unsqueeze(-1).expand_as(centroids))
        perm, offsets = label_order(labels, clusters, text=(start, stop), text_block=TEXT_BLOCK)
        return Blocks(perm, offsets, clusters), centroids


def _query_means(blocked: Blocked) -> tuple[Tensor, Tensor]:
    """Means of the query blocks' valid tokens, and how many these are."""
    blocks, valid = blocked.queries, blocked.geometry.key_valid
    if valid is None:
        return blocked.query_mean(), blocks.sizes
    _, bounds = valid_order(blocks.perm, blocks.offsets, valid)
    mean = block_mean(blocked.q, perm=blocks.perm, offsets=blocks.offsets, valid=valid)
    return mean, bounds.diff(dim=-1)


def _moved(centroids: Tensor, means: Tensor, count: Tensor) -> Tensor:
    """Means of the clusters, the first blocks; one without a token stays where it was."""
    clusters = centroids.shape[2]
    some = (count[..., :clusters] > 0).unsqueeze(-1)
    return torch.where(some, means[:, :, :clusters], centroids)
