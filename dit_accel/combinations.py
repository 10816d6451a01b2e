"""Which layouts, routes and rests go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from dit_accel.components import COMPONENTS, make
from dit_accel.errors import InputError
from dit_accel.method import Method


def _rests() -> Iterator[tuple[str, Any]]:
    """Every rest, with every first-order term that it can have."""
    for name, component in COMPONENTS["rest"].items():
        if "taylor" not in component.options:
            yield name, make("rest", name)
            continue
        for taylor in ("global", "rest"):
            yield f"{name}, {taylor}", make("rest", {"name": name, "taylor": taylor})


LAYOUTS: Final = {name: make("layout", name) for name in COMPONENTS["layout"]}
ROUTES: Final = {name: make("route", name) for name in COMPONENTS["route"]}
RESTS: Final = dict(_rests())


@dataclass(frozen=True, slots=True)
class Combination:
    """A layout, a route and a rest, and why they are refused; no ``reason`` if they are not."""

    layout: str
    route: str
    rest: str
    reason: str | None


def table() -> Iterator[Combination]:
    """Every combination, tried."""
    for layout_name, layout in LAYOUTS.items():
        for route_name, route in ROUTES.items():
            for rest_name, rest in RESTS.items():
                reason = None
                try:
                    Method(layout, route, rest)
                except InputError as error:
                    reason = str(error).rpartition(": ")[2]
                yield Combination(layout_name, route_name, rest_name, reason)
