"""Layouts, routes and rests by name, with their options: what a configuration can spell.

>>> from dit_accel import components
>>> components.make("layout", {"name": "tile3d", "tile": [4, 4, 8]})
Tile3D(tile=(4, 4, 8))
>>> components.make("route", "topk", density=0.2)
PooledScore(select='topk', density=0.2, p=0.9, bias=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final, Literal, get_type_hints

from dit_accel.cluster import KMeans
from dit_accel.error_route import ErrorAware
from dit_accel.errors import InputError
from dit_accel.layout import LAYOUTS, Tile3D, tile_of
from dit_accel.options import Opt, Option, closest, find, option_of, plain
from dit_accel.pyramid import Pyramid
from dit_accel.rest import Centroid, Drop, Moment, Taylor
from dit_accel.route import Everything, PooledScore
from dit_accel.token_route import Gate

Kind = Literal["layout", "route", "rest"]


@dataclass(frozen=True, slots=True)
class Component:
    """One layout, route or rest.

    Attributes:
        kind, name: what a configuration calls it.
        make: its class.
        options: the fields that can be set.
        fixed: fields that the name stands for.
        adapt: what a preset's own options, such as ``block_size``, mean for it.
    """

    kind: Kind
    name: str
    make: type
    options: Mapping[str, Option]
    fixed: Mapping[str, Any]
    adapt: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None


def _component(
    kind: Kind,
    name: str,
    make: type,
    *,
    without: Iterable[str] = (),
    adapt: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    **fixed: Any,
) -> Component:
    hints = get_type_hints(make)
    options = {
        one.name: option_of(f"{kind}.{one.name}", hints[one.name], one.default, Opt(""))
        for one in fields(make)
        if one.name not in fixed and one.name not in without
    }
    return Component(kind, name, make, MappingProxyType(options), MappingProxyType(fixed), adapt)


def _tiled(given: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"tile": tile_of(given["block_size"])} if "block_size" in given else {}


_ROWS: Final[dict[Kind, tuple[Component, ...]]] = {
    "layout": (
        *(
            _component("layout", name, make, adapt=_tiled if make is Tile3D else None)
            for name, make in LAYOUTS.items()
        ),
        _component("layout", "kmeans", KMeans),
    ),
    "route": (
        _component("route", "topk", PooledScore, without=("p",), select="topk"),
        _component("route", "topp", PooledScore, without=("density",), select="topp"),
        _component("route", "error", ErrorAware),
        _component("route", "gate", Gate),
        _component("route", "pyramid", Pyramid),
        _component("route", "everything", Everything),
    ),
    "rest": (
        _component("rest", "drop", Drop),
        _component("rest", "centroid", Centroid),
        _component("rest", "taylor", Taylor),
        _component("rest", "moment", Moment),
    ),
}
COMPONENTS: Final[Mapping[Kind, Mapping[str, Component]]] = {
    kind: {one.name: one for one in rows} for kind, rows in _ROWS.items()
}
"""The table: a new layout, route or rest is one row in here."""


def names(kind: Kind) -> tuple[str, ...]:
    """Names of the layouts, the routes or the rests."""
    return tuple(COMPONENTS[kind])


def choose(kind: Kind, owner: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``{"name": ..., option: value, ...}`` with its values checked.

    Args:
        kind: of component.
        owner: for messages.
        given: the name, and options of the component; what is not given is left to whoever makes
            it.

    Raises:
        InputError: the name or an option is unknown, or a value does not fit.
    """
    known, name = COMPONENTS[kind], given.get("name")
    if not isinstance(name, str) or name not in known:
        got = repr(name) if "name" in given else "nothing"
        raise InputError(
            f"{owner}: {kind}.name: expected {' | '.join(known)}, got {got}{closest(name, known)}"
        )
    options = known[name].options
    values = {
        key: find(f"{owner}: {kind}", options, key).check(owner, value)
        for key, value in given.items()
        if key != "name"
    }
    return {"name": name, **values}


def make(kind: Kind, choice: Any, **context: Any) -> Any:
    """The component of a choice.

    Args:
        kind: of component.
        choice: a name, a mapping with the name and options, or a component, which is returned as
            it is.
        context: what a preset says for whichever component has a use for it, such as
            ``block_size``; the choice's own options come first.

    Raises:
        InputError: the name or an option is unknown, or a value does not fit.
    """
    if isinstance(choice, str):
        choice = {"name": choice}
    if not isinstance(choice, Mapping):
        return choice
    own = choose(kind, kind, choice)
    component = COMPONENTS[kind][own.pop("name")]
    known = component.adapt(context) if component.adapt is not None else context
    base = {name: value for name, value in known.items() if name in component.options}
    try:
        return component.make(**{**base, **own, **component.fixed})
    except InputError as error:
        text = str(error).removeprefix(f"{component.make.__name__}: ")
        raise InputError(f"{kind}.{text}") from None


def describe(kind: Kind, part: Any) -> dict[str, Any]:
    """A component as a configuration has it, with all of its options.

    Raises:
        InputError: it is none of the table's.
    """
    for component in COMPONENTS[kind].values():
        if type(part) is component.make and all(
            getattr(part, name) == value for name, value in component.fixed.items()
        ):
            options = {name: plain(getattr(part, name)) for name in component.options}
            return {"name": component.name, **options}
    raise InputError(
        f"to_config: {kind}: expected {' or '.join(names(kind))}, which have a name, got {part!r}"
    )
