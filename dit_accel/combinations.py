"""Which routes and rests go together. Every layout goes with every one of these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dit_accel.error_route import ErrorAware
from dit_accel.errors import InputError
from dit_accel.layout import Raster
from dit_accel.method import Method
from dit_accel.pyramid import Pyramid
from dit_accel.rest import Centroid, Drop, Moment, Rest, Taylor
from dit_accel.route import Everything, PooledScore, Route
from dit_accel.token_route import Gate

ROUTES: dict[str, Route] = {
    "pooled score, top-k": PooledScore("topk"),
    "pooled score, top-p": PooledScore("topp"),
    "error": ErrorAware(),
    "token gate": Gate(),
    "pyramid": Pyramid(),
    "everything": Everything(),
}
RESTS: dict[str, Rest] = {
    "drop": Drop(),
    "centroid": Centroid(),
    "taylor, global": Taylor("global"),
    "taylor, rest": Taylor("rest"),
    "moment, global": Moment("second", "global"),
    "moment, rest": Moment("second", "rest"),
}


@dataclass(frozen=True, slots=True)
class Combination:
    """A route and a rest, and why they are refused; no ``reason`` when they go together."""

    route: str
    rest: str
    reason: str | None


def table() -> Iterator[Combination]:
    """Every pair, tried."""
    for route_name, route in ROUTES.items():
        for rest_name, rest in RESTS.items():
            reason = None
            try:
                Method(Raster(), route, rest)
            except InputError as error:
                reason = str(error).rpartition(": ")[2]
            yield Combination(route_name, rest_name, reason)
