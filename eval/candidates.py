"""What is compared: presets by name, and combinations of a layout, a route and a rest by theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Final

from dit_accel import components, presets
from dit_accel.combinations import RESTS, table
from dit_accel.errors import InputError
from dit_accel.eval.samples import Settings
from dit_accel.eval.variants import options_for
from dit_accel.method import Method
from dit_accel.options import closest
from dit_accel.pipelines import embedded


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


def of_run(settings: Settings) -> list[Candidate]:
    """The methods of an evaluation run, under their names in it."""
    return [
        Candidate(
            variant.slug,
            "preset",
            variant.density,
            presets.build(variant.method, **variant.given),
        )
        for variant in settings.variants
        if variant.role == "method"
    ]


@cache
def combination_names() -> tuple[str, ...]:
    """All ``layout/route/rest`` that go together."""
    return tuple(
        f"{one.layout}/{one.route}/{rest_name(one.rest)}"
        for one in table()
        # with everything exact nothing is left to a rest
        if one.reason is None and (one.route != "everything" or one.rest == "drop")
    )


def rest_name(words: str) -> str:
    """``taylor-rest`` for ``taylor, rest``; the global term goes without saying."""
    name, _, scope = words.partition(", ")
    return name if scope in ("", "global") else f"{name}-{scope}"


def _of_preset(
    name: str, densities: tuple[float, ...], model: str | None, given: Mapping[str, Any]
) -> list[Candidate]:
    known = presets.get(name).accepts(given)
    chosen = options_for(model, name, {key: value for key, value in given.items() if key in known})
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
    layout_name, route_name, short = name.split("/")
    layout = components.make("layout", layout_name, block_size=block)
    rest = next(rest for words, rest in RESTS.items() if rest_name(words) == short)
    share = _SHARE.get(route_name)
    if share is None:
        route = components.make("route", route_name)
        return [Candidate(name, "combination", None, Method(layout, route, rest, name=name))]
    made = []
    for density in densities:
        label = f"{name}@{density:g}"
        route = components.make("route", {"name": route_name, **share, **_asked(share, density)})
        method = Method(layout, route, rest, name=label)
        made.append(Candidate(label, "combination", density, method))
    return made


_SHARE: Final[dict[str, dict[str, Any]]] = {
    "topk": {"density": None},
    "error": {"density": None},
    # by number, not by the sum of its gates
    "gate": {"threshold": None, "mode": "topk"},
}
"""How a route is asked for a share of the pairs; of the others it follows from the data."""


def _asked(share: dict[str, Any], density: float) -> dict[str, Any]:
    return {name: density for name, value in share.items() if value is None}
