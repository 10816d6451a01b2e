"""What is compared: presets by name, and combinations of a layout, a route and a rest by theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final

from dit_accel import presets
from dit_accel.cluster import KMeans
from dit_accel.combinations import RESTS, ROUTES
from dit_accel.error_route import ErrorAware
from dit_accel.errors import InputError
from dit_accel.layout import LAYOUTS, Layout
from dit_accel.method import Method
from dit_accel.options import closest
from dit_accel.pipelines import embedded
from dit_accel.route import PooledScore, Route
from dit_accel.token_route import Gate

ROUTE_NAMES: Final = {
    "topk": "pooled score, top-k",
    "topp": "pooled score, top-p",
    "error": "error",
    "gate": "token gate",
    "pyramid": "pyramid",
    "everything": "everything",
}
REST_NAMES: Final = {
    "drop": "drop",
    "centroid": "centroid",
    "taylor": "taylor, global",
    "taylor-rest": "taylor, rest",
    "moment": "moment, global",
    "moment-rest": "moment, rest",
}
LAYOUT_NAMES: Final = (*LAYOUTS, "kmeans")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One thing to measure.

    Attributes:
        name: unique: a preset's name or ``layout/route/rest``, and ``@density`` where one was asked
            for.
        kind: ``preset`` or ``combination``.
        asked: the density asked for, if any.
        method: what runs.
    """

    name: str
    kind: str
    asked: float | None
    method: Method

    @property
    def parts(self) -> tuple[str, str, str]:
        """Layout, route and rest in words, for tables."""
        method = self.method
        if self.kind == "combination":
            layout, route, rest = self.name.partition("@")[0].split("/")
            return layout, route, rest
        return tuple(  # type: ignore[return-value]
            type(getattr(part, "inner", part)).__name__.lower()
            for part in (method.layout, method.route, method.rest)
        )


def candidates(
    names: Iterable[str],
    patterns: Iterable[str] = (),
    *,
    densities: Iterable[float] = (0.15,),
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Candidate]:
    """Presets and combinations, each at every density that it can be asked for.

    Args:
        names: presets.
        patterns: of ``layout/route/rest`` with ``*`` and ``?``, such as ``gilbert/topk/*``.
        densities: in (0, 1]; a preset or route without that option comes once.
        model: an embedded model, whose suggested options are used.
        options: of the presets, where they have them, and ``block_size`` of combinations.

    Raises:
        InputError: a name is unknown, a pattern matches nothing, or an option does not fit.
    """
    densities = tuple(densities)
    given = dict(options or {})
    found: dict[str, Candidate] = {}
    for name in names:
        for made in _of_preset(name, densities, model, given):
            found[made.name] = made
    block = {**embedded.options_for(model, "pisa", {}), **given}.get("block_size", 64)
    for pattern in patterns:
        matching = [name for name in combination_names() if fnmatchcase(name, pattern)]
        if not matching:
            raise InputError(
                f"combinations: expected a pattern of layout/route/rest such as gilbert/topk/*, "
                f"got {pattern!r}, which matches none{closest(pattern, combination_names())}"
            )
        for name in matching:
            for made in _of_combination(name, densities, block):
                found[made.name] = made
    return list(found.values())


def combination_names() -> list[str]:
    """All ``layout/route/rest`` that go together."""
    return [
        f"{layout}/{route}/{rest}"
        for layout in LAYOUT_NAMES
        for route in ROUTE_NAMES
        for rest in REST_NAMES
        if _refusal(route, rest) is None and (route != "everything" or rest == "drop")
    ]


def _refusal(route: str, rest: str) -> str | None:
    refuses = getattr(ROUTES[ROUTE_NAMES[route]], "refuses", None)
    return None if refuses is None else refuses(RESTS[REST_NAMES[rest]])


def _of_preset(
    name: str, densities: tuple[float, ...], model: str | None, given: Mapping[str, Any]
) -> list[Candidate]:
    known = presets.get(name).accepts(given)
    chosen = embedded.options_for(
        model, name, {key: value for key, value in given.items() if key in known}
    )
    if name == "dense":
        raise InputError("methods: expected sparse methods, got dense, which is the reference")
    if "density" not in known:
        return [Candidate(name, "preset", None, presets.build(name, **chosen))]
    return [
        Candidate(
            f"{name}@{density:g}",
            "preset",
            density,
            presets.build(name, **{**chosen, "density": density}),
        )
        for density in densities
    ]


def _of_combination(name: str, densities: tuple[float, ...], block: int) -> list[Candidate]:
    layout_name, route_name, rest_name = name.split("/")
    layout: Layout = KMeans() if layout_name == "kmeans" else LAYOUTS[layout_name](block)
    route, rest = ROUTES[ROUTE_NAMES[route_name]], RESTS[REST_NAMES[rest_name]]
    made = []
    for density in densities:
        chosen = at_density(route, density)
        asked = density if chosen is not None else None
        label = name if asked is None else f"{name}@{density:g}"
        method = Method(layout, chosen or route, rest, name=label)
        made.append(Candidate(label, "combination", asked, method))
        if asked is None:
            break
    return made


def at_density(route: Route, density: float) -> Route | None:
    """A route that computes so much exactly; ``None`` for one whose share follows from the data.

    A `Gate` then chooses by number, not by the sum of its gates.
    """
    if isinstance(route, PooledScore):
        return replace(route, density=density) if route.select == "topk" else None
    if isinstance(route, ErrorAware):
        return replace(route, density=density)
    if isinstance(route, Gate):
        return replace(route, threshold=density, mode="topk")
    return None
