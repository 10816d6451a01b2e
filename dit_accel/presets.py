"""Methods by name. A method is one function and one row in here; see docs/new_method.md.

>>> from dit_accel import presets
>>> presets.pisa(density=0.2).name
'pisa'
>>> presets.build("pisa", density=0.2) == presets.pisa(density=0.2)
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from dit_accel import config
from dit_accel.components import make
from dit_accel.density import Budget
from dit_accel.error_route import ErrorAware
from dit_accel.errors import InputError
from dit_accel.flashblock import Cycle, around
from dit_accel.method import Method, Schedule
from dit_accel.options import Opt, closest
from dit_accel.preset_options import (
    BlockSize,
    Clusters,
    DenseBackend,
    DenseBelow,
    DenseLayers,
    DenseSteps,
    Density,
    LayoutOption,
    RestOption,
    RouteOption,
    TaylorOption,
    WeightOption,
)
from dit_accel.pyramid import RATIOS, Pyramid
from dit_accel.registry import Paper, Preset, build, catalogue, get, parse_option, preset
from dit_accel.rest import Drop
from dit_accel.suggestions import Suggestion, for_model
from dit_accel.token_route import Gate

__all__ = [
    "Paper",
    "Preset",
    "Suggestion",
    "build",
    "catalogue",
    "custom",
    "dense",
    "flashblock",
    "for_model",
    "get",
    "parse_option",
    "pisa",
    "psa",
    "svg_ear",
    "vmoba",
]

# --- the table ------------------------------------------------------------------------------------


@preset("torch's dense attention, the reference for everything else")
def dense(
    backend: Annotated[
        DenseBackend | None,
        Opt("who computes it; none is diffusers' own code in a pipeline, and sdpa elsewhere"),
    ] = None,
) -> Method:
    """Dense attention: no layout, no route, no rest.

    Raises:
        InputError: the backend cannot run here, with the reason.
    """
    return Method(None, None, None, backend=backend)


@preset("any layout with any route and any rest")
def custom(
    layout: LayoutOption = "gilbert",
    route: RouteOption = "topk",
    rest: RestOption = "taylor",
    density: Density = 0.15,
    block_size: BlockSize = 64,
    taylor: TaylorOption = "global",
    weight: WeightOption = "second",
    dense_steps: DenseSteps = 0,
    dense_layers: DenseLayers = (),
    dense_below: DenseBelow = "auto",
    dense_backend: Annotated[
        DenseBackend | None,
        Opt("who computes dense steps and layers, as backend of dense"),
    ] = None,
) -> Method:
    """A layout, a route and a rest, each by name, with options of its own, or as an object.

    ``density``, ``block_size``, ``taylor`` and ``weight`` are for those parts that have such an
    option and are not given another.
    """
    return Method(
        make("layout", layout, block_size=block_size),
        make("route", route, density=density),
        make("rest", rest, taylor=taylor, weight=weight),
        Schedule(dense_steps, dense_layers, dense_below),
        backend=dense_backend,
    )


@preset(
    "piecewise sparse attention: the best blocks exactly, a Taylor expansion of the others",
    paper=Paper(
        "PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers",
        "2602.01077",
    ),
    deviations=(
        "The blocks follow a generalised Hilbert curve by default; layout='raster' keeps the "
        "model's order.",
        "Query blocks are twice as long as key blocks, 128 and 64, since 64 queries at a time "
        "cannot keep a GPU busy; block_q=64 is the paper's.",
        "Text tokens of a joint sequence are always exact, and never part of a video block; the "
        "public code for FLUX cuts text and image alike.",
        "The first-order term sums over all video key blocks, as the paper's kernel does; "
        "taylor='rest' sums over the blocks left to the rest.",
    ),
)
def pisa(
    density: Density = 0.15,
    block_size: BlockSize = 64,
    block_q: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Opt("queries in a block; none is twice as many as keys"),
    ] = None,
    layout: LayoutOption = "gilbert",
    bias: Annotated[bool, Opt("add the norm of a block's covariance to its score")] = True,
    rest: RestOption = "taylor",
    taylor: TaylorOption = "global",
    weight: WeightOption = "second",
    route: RouteOption = "topk",
    p: Annotated[Budget, Opt("share of the attention that route=topp keeps")] = 0.9,
    dense_steps: DenseSteps = 0,
    dense_layers: DenseLayers = (),
    dense_below: DenseBelow = "auto",
) -> Method:
    """PISA (arXiv 2602.01077), every component exchangeable by keyword.

    ``density`` is for ``route="topk"`` and ``"error"``, ``p`` for ``route="topp"``; a route, layout
    or rest that is given as an object brings its own settings. ``block_size`` is ignored by
    ``layout="cyclic"``, ``block_q`` by layouts that have one block size for both.
    """
    keys = layout.get("block_size", block_size) if isinstance(layout, Mapping) else block_size
    queries = 2 * keys if block_q is None else block_q
    return Method(
        make("layout", layout, block_size=block_size, query_block_size=queries),
        make("route", route, density=density, p=p, bias=bias),
        make("rest", rest, taylor=taylor, weight=weight),
        Schedule(dense_steps, dense_layers, dense_below),
    )


@preset(
    "SVG-EAR: semantic clusters, centroids for what is not computed, routing by their error",
    paper=Paper(
        "SVG-EAR: Parameter-Free Linear Compensation for Sparse Video Generation via Error-aware "
        "Routing",
        "2603.08982",
    ),
    deviations=(
        "Centroids are kept by guidance branch; share_branches=true shares them, as the public "
        "code does.",
        "Without q_clusters and k_clusters the number of clusters grows with the sequence, from "
        "300 and 1000 at 75,600 tokens.",
        "Text tokens of a joint sequence are always exact, and never part of a cluster.",
        "After the first call k-means takes one iteration; next_iterations=2 is the public code's.",
    ),
)
def svg_ear(
    density: Annotated[
        Budget, Opt("share of the video's keys that a query block attends to")
    ] = 0.22,
    q_clusters: Clusters = None,
    k_clusters: Clusters = None,
    next_iterations: Annotated[
        int, Opt("iterations of layout=kmeans in a call after the first"), Field(ge=0)
    ] = 1,
    layout: LayoutOption = "kmeans",
    block_size: BlockSize = 64,
    rest: RestOption = "centroid",
    taylor: TaylorOption = "global",
    weight: WeightOption = "second",
    share_branches: Annotated[
        bool, Opt("start from centroids of the call before, whatever its guidance branch")
    ] = False,
    seed: Annotated[int, Opt("of the first centroids"), Field(ge=0)] = 0,
    dense_steps: DenseSteps = 0,
    dense_layers: DenseLayers = (),
    dense_below: DenseBelow = "auto",
) -> Method:
    """SVG-EAR (arXiv 2603.08982), every component exchangeable by keyword.

    ``block_size`` is for layouts other than ``"kmeans"``, the clusters' options for that one. The
    public scripts keep the first 20% of the steps and 3% of the layers of Wan dense, and 10% and 3%
    of HunyuanVideo.
    """
    clusters = {"q_clusters": q_clusters, "k_clusters": k_clusters}
    return Method(
        make(
            "layout",
            layout,
            block_size=block_size,
            next_iterations=next_iterations,
            share_branches=share_branches,
            seed=seed,
            **clusters,
        ),
        ErrorAware(density),
        make("rest", rest, taylor=taylor, weight=weight),
        Schedule(dense_steps, dense_layers, dense_below),
    )


@preset(
    "VMoBA: every query token chooses key blocks; time, space and space-time blocks by layer",
    paper=Paper("VMoBA: Mixture-of-Block Attention for Video Diffusion Models", "2506.23858"),
    deviations=(
        "The paper trains with it; without training it keeps the first denoising steps dense, 12 "
        "of 50: dense_steps=0.24.",
        "Gates are normalised over a head with scope=token too; the public code does so by token.",
        "rest='centroid' and others stand in for what the paper drops.",
        "Text tokens of a joint sequence select everything, and are selected by all.",
    ),
)
def vmoba(
    threshold: Annotated[
        Budget, Opt("share of the gate, or of the pairs with mode=topk, to select")
    ] = 0.25,
    scope: Annotated[
        Literal["head", "token"], Opt("choose among all pairs of a head, or token by token")
    ] = "head",
    mode: Annotated[
        Literal["threshold", "topk"], Opt("by the sum of the gates, or by their number")
    ] = "threshold",
    layout: LayoutOption = "cyclic",
    block_size: BlockSize = 64,
    rest: RestOption = "drop",
    taylor: TaylorOption = "global",
    weight: WeightOption = "second",
    dense_steps: DenseSteps = 0,
    dense_layers: DenseLayers = (),
    dense_below: DenseBelow = "auto",
) -> Method:
    """VMoBA (arXiv 2506.23858), every component exchangeable by keyword.

    ``block_size`` is for layouts other than ``"cyclic"``.
    """
    return Method(
        make("layout", layout, block_size=block_size),
        Gate(threshold, scope, mode),
        make("rest", rest, taylor=taylor, weight=weight),
        Schedule(dense_steps, dense_layers, dense_below),
    )


@preset(
    "PSA: keys averaged more coarsely the less they matter, and skipped in the end",
    paper=Paper(
        "PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation",
        "2512.04025",
    ),
    deviations=(
        "The tokens looked at are evenly strided, so that runs repeat; sample=random draws one of "
        "every four, where the public code draws from the whole block.",
        "No block is exact beyond what the bounds say; the public code keeps at least 8% with "
        "mode=threshold: min_exact=0.08.",
        "The similarity cap compares neighbours; the public code the first and the last key that "
        "are pooled together.",
        "Text tokens of a joint sequence are always exact, and never pooled.",
    ),
)
def psa(
    ratios: Annotated[
        str | tuple[float, ...] | None,
        Opt(
            "upper bounds of levels 1, 2, 4 and 8, or wan-14b, wan-1.3b or 4-step; none is "
            "wan-14b, and 4-step with mode=topk"
        ),
    ] = None,
    mode: Annotated[
        Literal["threshold", "topk"],
        Opt("bounds on the importance before a block, or on its rank"),
    ] = "threshold",
    block_q: Annotated[int, Opt("queries in a block"), Field(ge=1)] = 128,
    block_k: Annotated[int, Opt("keys in a block"), Field(ge=1)] = 64,
    layout: LayoutOption = "gilbert",
    sample: Annotated[
        Literal["stride", "random"], Opt("which quarter of a block's tokens is looked at")
    ] = "stride",
    similarity_cap: Annotated[bool, Opt("pool only neighbours that are alike")] = False,
    seed: Annotated[int, Opt("of sample=random"), Field(ge=0)] = 0,
    min_exact: Annotated[
        float, Opt("least share of a row's blocks that is exact, the best ones"), Field(ge=0, le=1)
    ] = 0.0,
    dense_steps: DenseSteps = 0,
    dense_layers: DenseLayers = (),
    dense_below: DenseBelow = "auto",
) -> Method:
    """PSA (arXiv 2512.04025).

    Layouts that have one block size for both take ``block_k``. The bounds are the same in every
    step and layer: with ``mode="threshold"`` they are shares of the importance, and the density
    follows from it by itself.
    """
    if ratios is None:
        ratios = "4-step" if mode == "topk" else "wan-14b"
    if isinstance(ratios, str):
        if ratios not in RATIOS:
            raise InputError(
                f"psa: ratios: expected four bounds, {' or '.join(RATIOS)}, got {ratios!r}"
                f"{closest(ratios, RATIOS)}"
            )
        ratios = RATIOS[ratios]
    return Method(
        make("layout", layout, block_size=block_k, query_block_size=block_q),
        Pyramid(tuple(ratios), mode, sample, similarity_cap, seed, min_exact),  # type: ignore[arg-type]
        Drop(),
        Schedule(dense_steps, dense_layers, dense_below),
    )


@preset(
    "FlashBlock: what a sparse method leaves out, computed now and then, and kept in between",
    paper=Paper(
        "FlashBlock: Attention Caching for Efficient Long-Context Block Diffusion", "2602.05305"
    ),
    deviations=(
        "In block diffusion (AnyFlow FAR) inner='dense' is the paper's; a sparse inner method acts "
        "inside the chunk.",
        "On a bidirectional model the outside is the exact complement of the inner method's plan; "
        "layout and plan are frozen between refreshes, and a refresh costs as much as dense "
        "attention.",
    ),
    inherits="inner",
)
def flashblock(
    inner: Annotated[
        str | Method,
        Opt(
            "the method inside, with its options beside; dense and psa in block diffusion only",
            ("pisa", "svg_ear", "vmoba", "psa", "dense"),
            Method,
            lambda owner, given: config.method_of(f"{owner}: inner", given),
        ),
    ] = "pisa",
    refresh: Annotated[
        int, Opt("denoising steps from one computation of the outside to the next"), Field(ge=1)
    ] = 5,
    layers: Annotated[
        tuple[int, ...] | None, Opt("layers that keep their outside; none means all")
    ] = None,
    budget_gib: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Opt("GiB that all kept partials and plans may take; none is no limit"),
    ] = None,
    dense_steps: DenseSteps = 0,
    dense_layers: DenseLayers = (),
    dense_below: DenseBelow = "auto",
    **inner_options: Any,
) -> Method:
    """FlashBlock (arXiv 2602.05305) around a method, such as ``inner="pisa", density=0.15``.

    In block diffusion the cached context is kept, and the inner method acts inside the chunk.
    Elsewhere what the inner method leaves out is kept, and its rest serves its route alone, and
    the layers that keep nothing; ``dense`` leaves nothing out, and the pooled pairs of ``psa`` have
    no exact complement, so that both are refused there. ``dense_steps``, ``dense_layers`` and
    ``dense_below``, if given, take the place of those of an inner `Method`.
    """
    method = build(inner, **inner_options) if isinstance(inner, str) else inner
    budget = None if budget_gib is None else int(budget_gib * 2**30)
    kept = around(method, Cycle(refresh, layers, budget))
    given = dense_steps or dense_layers or dense_below != "auto"
    if isinstance(inner, Method) and not given:
        return kept
    return replace(kept, schedule=Schedule(dense_steps, dense_layers, dense_below))
