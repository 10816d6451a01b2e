"""From what was timed to what is told: the mean step of a run, and the real number of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dit_accel.eval.pipeline_models import Spec
from dit_accel.eval.pipeline_parts import PARTS

DENSE = "dense"
"""The name of dense attention, which is in every run."""


def means(kinds: Mapping[str, Any], spec: Spec) -> dict[str, float]:
    """Milliseconds of a forward of the mean step, kinds of steps by how often they come, and of all
    forwards of that step."""
    total = sum(kind["count"] for kind in kinds.values())
    mean = sum(kind["count"] * kind["ms"] for kind in kinds.values()) / total
    return {"mean_ms": mean, "step_ms": mean * spec.forwards}


def reduced(spec: Spec, layers: tuple[int, int]) -> list[dict[str, int]]:
    """Few of every kind, and then more of each kind in turn."""
    few = dict.fromkeys(spec.layers, layers[0])
    return [few, *({**few, kind: layers[1]} for kind in spec.layers)]


def extrapolated(
    spec: Spec, runs: Sequence[Mapping[str, Any]], layers: tuple[int, int]
) -> dict[str, Any]:
    """Times of the real number of layers: what lies outside of them once, and each as often as
    there are."""
    few, *more = runs
    methods: dict[str, Any] = {}
    for name, method in few["methods"].items():
        kinds: dict[str, Any] = {}
        for kind, base in method["kinds"].items():

            def all_of(
                of: Callable[[Any], float], name: str = name, kind: str = kind
            ) -> tuple[float, dict[str, float]]:
                first = of(few["methods"][name]["kinds"][kind])
                slopes = {}
                for which, run in zip(spec.layers, more, strict=True):
                    then = of(run["methods"][name]["kinds"][kind])
                    slopes[which] = (then - first) / (layers[1] - layers[0])
                beyond = (slopes[which] * (n - layers[0]) for which, n in spec.layers.items())
                return first + sum(beyond), slopes

            took, slopes = all_of(lambda kind: kind["ms"])
            kinds[kind] = {
                "count": base["count"],
                "ms": took,
                "layer_ms": slopes,
                "density": more[0]["methods"][name]["kinds"][kind]["density"],
            }
            if "parts" in base:
                parts = {
                    part: all_of(lambda kind, part=part: kind["parts"][part])[0]  # type: ignore[misc]
                    for part in PARTS
                }
                kinds[kind] |= {"parts": parts, "remainder_ms": took - sum(parts.values())}
        methods[name] = {"kinds": kinds, **means(kinds, spec)}
    dense = methods[DENSE]["kinds"][DENSE]["ms"]
    for method in methods.values():
        for one in method["kinds"].values():
            one["ratio"] = dense / one["ms"]
    return {"layers": dict(spec.layers), "from": list(layers), "methods": methods}
