"""Kinds of denoising steps: what a method does in one need not cost what it does in another."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.cluster import KMeans
from dit_accel.density import ByStep, share_at
from dit_accel.errors import InputError
from dit_accel.flashblock import FrozenLayout, KeptRest
from dit_accel.method import Method
from dit_accel.types import Context, Geometry


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps to run, in order, and how often each kind of step comes in a whole run.

    Attributes:
        steps: numbers of denoising steps with their kinds.
        counts: of all steps of a run, by kind.
    """

    steps: tuple[tuple[int, str], ...]
    counts: dict[str, int]


def kinds(method: Method, num_steps: int, layer: int = 0, num_layers: int = 1) -> tuple[str, ...]:
    """The kind of every step of a run, as a layer sees it.

    ``dense``; ``refresh`` and ``kept`` where the outside is kept; ``cold`` and ``warm`` clusters;
    otherwise ``each``. Where a share goes by step, it stands behind.
    """
    found: list[str] = []
    refreshed: tuple[int, float | None] | None = None
    layout = method.layout.inner if isinstance(method.layout, FrozenLayout) else method.layout
    clusters = isinstance(layout, KMeans)
    cold = True
    for step in range(num_steps):
        where = Context(
            Geometry((1, 1, 1)), step=step, num_steps=num_steps, layer=layer, num_layers=num_layers
        )
        if method.wants_all(where):
            found.append("dense")
            continue
        words = []
        moves = True
        if isinstance(method.rest, KeptRest) and method.rest.cycle.applies(where):
            asked = method.rest.cycle.asked(where)
            moves = (
                refreshed is None
                or step - refreshed[0] >= method.rest.cycle.refresh
                or refreshed[1] != asked
            )
            if moves:
                refreshed = step, asked
            words.append("refresh" if moves else "kept")
        if clusters and moves:
            words.append("cold" if cold else "warm")
            cold = False
        budget = getattr(method.route, "budget", None)
        if budget is not None and isinstance(budget[1], ByStep):
            name, shares = budget
            words.append(f"{name} {share_at(name, shares, where):g}")
        found.append(", ".join(words) or "each")
    return tuple(found)


def plan(method: Method, num_steps: int, each: int = 2) -> Plan:
    """The first steps of every kind, at most ``each`` of one.

    A method's memory knows steps by number, so that those in between can be left out.
    """
    every = kinds(method, num_steps)
    counts: dict[str, int] = {}
    steps = []
    for step, kind in enumerate(every):
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= each:
            steps.append((step, kind))
    return Plan(tuple(steps), counts)


def check_extrapolation(name: str, method: Method) -> None:
    """Raise an InputError if layers of a method differ in other ways than by turns of three."""
    from dit_accel.density import ByLayer

    budget = getattr(method.route, "budget", None)
    by_layer = budget is not None and isinstance(budget[1], ByLayer)
    kept = isinstance(method.rest, KeptRest) and method.rest.cycle.layers is not None
    if method.schedule.dense_layers or by_layer or kept:
        raise InputError(
            f"{name}: expected layers that cost alike, since times go by the layer, got options "
            "that single some out; --whole times all of them"
        )
