"""Methods by name. A method is a few functions and one row in here.

>>> from dit_accel import presets
>>> presets.pisa(density=0.2).name
'pisa'
>>> presets.build("pisa", density=0.2) == presets.pisa(density=0.2)
True
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, ParamSpec

from pydantic import Field

from dit_accel.cluster import KMeans
from dit_accel.error_route import ErrorAware
from dit_accel.errors import InputError
from dit_accel.layout import LAYOUTS, Layout
from dit_accel.method import Method, Schedule
from dit_accel.options import Opt, Option, checked, closest, find, options_of
from dit_accel.rest import Centroid, Drop, FirstOrder, Moment, Rest, Taylor
from dit_accel.route import Everything, PooledScore, Route
from dit_accel.token_route import Gate

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method comes from: the title, and the number on arXiv."""

    title: str
    arxiv: str


@dataclass(frozen=True, slots=True)
class Preset:
    """One row of the table.

    Attributes:
        name: what `build` knows it by.
        summary: one line.
        paper: where it comes from; ``None`` for what is nobody's.
        deviations: where it differs from the paper, one sentence each.
        options: by name, in the order of the signature.
        make: builds the method from options that were checked.
    """

    name: str
    summary: str
    paper: Paper | None
    deviations: tuple[str, ...]
    options: MappingProxyType[str, Option]
    make: Callable[..., Method]


_TABLE: dict[str, Preset] = {}


def preset(
    summary: str, *, paper: Paper | None = None, deviations: tuple[str, ...] = ()
) -> Callable[[Callable[P, Method]], Callable[P, Method]]:
    """Register a function of keyword options as a preset, under the function's name.

    Every parameter is ``Annotated[type, Opt("help"), ...]`` with a default. Calls are checked
    before the function runs, and the method is given the name and the effective options.
    """

    def register(function: Callable[P, Method]) -> Callable[P, Method]:
        name, options = function.__name__, options_of(function)

        @functools.wraps(function)
        def make(*args: P.args, **kwargs: P.kwargs) -> Method:
            if args:
                raise InputError(f"{name}: expected options by keyword only, got {args!r}")
            values = checked(name, options, kwargs)
            method = function(**values)  # type: ignore[call-arg]
            return replace(method, name=name, options=values)

        _TABLE[name] = Preset(name, summary, paper, deviations, MappingProxyType(options), make)
        return make

    return register


def catalogue() -> tuple[Preset, ...]:
    """All presets, by name."""
    return tuple(_TABLE[name] for name in sorted(_TABLE))


def get(name: str) -> Preset:
    """One row of the table.

    Raises:
        InputError: there is none of this name.
    """
    if not isinstance(name, str) or name not in _TABLE:
        raise InputError(
            f"method: expected one of {', '.join(sorted(_TABLE))}, got {name!r}"
            f"{closest(name, _TABLE)}"
        )
    return _TABLE[name]


def build(name: str, **options: Any) -> Method:
    """The method of a preset.

    Args:
        name: of the preset.
        options: its options; see `catalogue`.

    Raises:
        InputError: the name, an option or a value is not known or does not fit.
    """
    return get(name).make(**options)


def parse_option(name: str, key: str, text: str) -> Any:
    """The value that ``--set key=text`` means for a preset.

    Raises:
        InputError: the preset or the option is unknown, or the value does not fit.
    """
    return find(name, get(name).options, key).parse(name, text)


# --- options that several presets share -----------------------------------------------------------

DenseSteps = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)],
    Opt("denoising steps that stay dense, the first ones: a count, or a fraction of all"),
]
DenseLayers = Annotated[
    tuple[int, ...], Opt("layers that stay dense; negative ones count from the last")
]
Density = Annotated[
    float, Opt("share of the video's block pairs computed exactly"), Field(gt=0, le=1)
]
BlockSize = Annotated[int, Opt("tokens in a block"), Field(ge=1)]
LayoutOption = Annotated[str | Layout, Opt("order of the tokens", (*LAYOUTS, "kmeans"), Layout)]
Clusters = Annotated[
    Annotated[int, Field(ge=1)] | None,
    Opt("clusters of layout=kmeans; none keeps their size what it is in the paper"),
]
RestOption = Annotated[
    str | Rest,
    Opt(
        "what stands in for the pairs not computed", ("drop", "centroid", "taylor", "moment"), Rest
    ),
]
TaylorOption = Annotated[
    FirstOrder | None, Opt("first-order term of the rest; drop and centroid have none")
]
WeightOption = Annotated[
    Literal["second", "gaussian"], Opt("correction of the weights by rest=moment")
]


def _layout(choice: str | Layout, block_size: int) -> Layout:
    if choice == "kmeans":
        return KMeans()
    return LAYOUTS[choice](block_size) if isinstance(choice, str) else choice


def _rest(
    choice: str | Rest, taylor: FirstOrder | None, weight: Literal["second", "gaussian"]
) -> Rest:
    if not isinstance(choice, str):
        return choice
    made: dict[str, Callable[[], Rest]] = {
        "drop": Drop,
        "centroid": Centroid,
        "taylor": lambda: Taylor(taylor),
        "moment": lambda: Moment(weight, taylor),
    }
    return made[choice]()


# --- the table ------------------------------------------------------------------------------------


@preset("torch's dense attention, the reference for everything else")
def dense() -> Method:
    """Dense attention: no layout, no route, no rest."""
    return Method(None, None, None)


@preset(
    "piecewise sparse attention: the best blocks exactly, a Taylor expansion of the others",
    paper=Paper(
        "PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers",
        "2602.01077",
    ),
    deviations=(
        "The blocks follow a generalised Hilbert curve by default; layout='raster' keeps the "
        "model's order.",
        "Text tokens of a joint sequence are always exact, and never part of a video block.",
        "The first-order term sums over all video key blocks, as the paper's kernel does; "
        "taylor='rest' sums over the blocks left to the rest.",
    ),
)
def pisa(
    density: Density = 0.15,
    block_size: BlockSize = 64,
    layout: LayoutOption = "gilbert",
    bias: Annotated[bool, Opt("add the norm of a block's covariance to its score")] = True,
    rest: RestOption = "taylor",
    taylor: TaylorOption = "global",
    weight: WeightOption = "second",
    route: Annotated[
        str | Route,
        Opt("how the exact blocks are chosen", ("topk", "topp", "everything"), Route),
    ] = "topk",
    p: Annotated[
        float, Opt("share of the attention that route=topp keeps"), Field(gt=0, le=1)
    ] = 0.9,
    dense_steps: DenseSteps = 0,
    dense_layers: DenseLayers = (),
) -> Method:
    """PISA (arXiv 2602.01077), every component exchangeable by keyword.

    ``density`` is for ``route="topk"``, ``p`` for ``route="topp"``; a route, layout or rest that is
    given as an object brings its own settings. ``block_size`` is ignored by ``layout="cyclic"``.
    """
    chosen: Route
    if not isinstance(route, str):
        chosen = route
    elif route == "everything":
        chosen = Everything()
    else:
        chosen = PooledScore("topp" if route == "topp" else "topk", density, p, bias)
    return Method(
        _layout(layout, block_size),
        chosen,
        _rest(rest, taylor, weight),
        Schedule(dense_steps, dense_layers),
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
    ),
)
def svg_ear(
    density: Annotated[
        float, Opt("share of the video's keys that a query block attends to"), Field(gt=0, le=1)
    ] = 0.22,
    q_clusters: Clusters = None,
    k_clusters: Clusters = None,
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
) -> Method:
    """SVG-EAR (arXiv 2603.08982), every component exchangeable by keyword.

    ``block_size`` is for layouts other than ``"kmeans"``, the clusters' options for that one. The
    public scripts keep the first 20% of the steps and 3% of the layers of Wan dense, and 10% and 3%
    of HunyuanVideo.
    """
    chosen: Layout
    if layout == "kmeans":
        chosen = KMeans(q_clusters, k_clusters, share_branches=share_branches, seed=seed)
    else:
        chosen = _layout(layout, block_size)
    return Method(
        chosen,
        ErrorAware(density),
        _rest(rest, taylor, weight),
        Schedule(dense_steps, dense_layers),
    )


@preset(
    "VMoBA: every query token chooses key blocks; time, space and space-time blocks by layer",
    paper=Paper("VMoBA: Mixture-of-Block Attention for Video Diffusion Models", "2506.23858"),
    deviations=(
        "The paper trains with it; without training it keeps the first denoising steps dense, 12 "
        "of 50: dense_steps=0.24.",
        "rest='centroid' and others stand in for what the paper drops.",
        "Text tokens of a joint sequence select everything, and are selected by all.",
    ),
)
def vmoba(
    threshold: Annotated[
        float,
        Opt("share of the gate, or of the pairs with mode=topk, to select"),
        Field(gt=0, le=1),
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
) -> Method:
    """VMoBA (arXiv 2506.23858), every component exchangeable by keyword.

    ``block_size`` is for layouts other than ``"cyclic"``.
    """
    return Method(
        _layout(layout, block_size),
        Gate(threshold, scope, mode),
        _rest(rest, taylor, weight),
        Schedule(dense_steps, dense_layers),
    )
