"""What the page opens with: the answer, as a table and a slider, and the plots behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dit_accel.eval.figures import Summary, VariantSummary
from dit_accel.eval.report import plots
from dit_accel.eval.report.answers import answers, best_of, finite, gain_of, methods
from dit_accel.eval.report.tables import cell
from dit_accel.eval.report.text import interval, setting, with_unit
from dit_accel.eval.samples import Run, Sample


def facts(run: Run, summary: Summary, samples: Sequence[Sample]) -> dict[str, Any]:
    """What stands under the title."""
    chosen = run.settings
    expected = len(chosen.every_key())
    gpus = run.machine.get("gpus") or ()
    return {
        "model": chosen.model,
        "prompts": len(chosen.prompts),
        "seeds": len(chosen.seeds),
        "samples": len(samples),
        "expected": expected,
        "complete": summary.complete,
        "size": f"{chosen.width}×{chosen.height}"
        + (f", {chosen.frames} frames" if chosen.frames > 1 else ""),
        "steps": chosen.steps,
        "guidance": f"{chosen.guidance:g}",
        "device": gpus[0] if chosen.device.startswith("cuda") and gpus else "CPU",
        "dtype": chosen.dtype,
    }


def rows(summary: Summary, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of the opening table; a rung that only dense reaches is told as such."""
    rows = []
    for answer in answers(summary):
        best = answer.variant
        row: dict[str, Any] = {"least": answer.least, "variant": None}
        if best is not None:
            row |= {
                "variant": best.slug,
                "method": best.method,
                "colour": numbers[best.method],
                "setting": _asked(best),
                "figures": [
                    cell(best, summary.measures[name], best=False)
                    for name in ("psnr", "speedup", "density")
                ],
            }
        rows.append(row)
    return rows


_BUDGETS = ("density", "p", "threshold", "ratios")
"""Options that say how much a method computes."""


def _asked(variant: VariantSummary) -> str:
    """What a variant was set to, in few words."""
    told = {name: variant.options.get(name) for name in _BUDGETS}
    if "route" in variant.options:
        # one of the two counts
        del told["density" if variant.options["route"] == "topp" else "p"]
    return setting(told)


def slider(summary: Summary, numbers: dict[str, int]) -> dict[str, Any] | None:
    """What the slider says for every whole decibel; ``None`` where there is nothing to choose."""
    gain = gain_of(summary)
    values = [
        figure.value
        for variant in methods(summary)
        if (figure := finite(variant.figures.get("psnr"))) is not None
    ]
    if not values:
        return None
    low, high = math.floor(min(values)), math.ceil(max(values))
    steps = []
    for least in range(low, high + 1):
        best = best_of(methods(summary), gain, least)
        steps.append(None if best is None else _said(best, summary, numbers))
    start = max((i for i, step in enumerate(steps) if step is not None), default=0)
    return {"low": low, "high": high, "start": low + start, "steps": steps}


def _said(variant: VariantSummary, summary: Summary, numbers: dict[str, int]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "variant": variant.slug,
        "method": variant.method,
        "colour": numbers[variant.method],
        "setting": _asked(variant),
    }
    for name in ("psnr", "speedup", "density"):
        figure = variant.figures.get(name)
        measure = summary.measures[name]
        told[name] = None if figure is None else with_unit(figure.value, measure)
        told[f"{name}_span"] = "" if figure is None else interval(figure, measure)
    share = variant.figures.get("density")
    told["pairs"] = None if share is None else f"{share.value:.1%}"
    return told


def plots_of(summary: Summary, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """One pair of plots for every measure of fidelity that there is."""
    made = []
    floor = next((v for v in summary.variants if v.role == "floor"), None)
    for measure in summary.measures.values():
        if measure.group != "fidelity":
            continue
        drawn = []
        for name, falls in (("speedup", False), ("density", True)):
            points = []
            for variant in methods(summary):
                x, y = variant.figures.get(name), variant.figures.get(measure.name)
                if finite(x) is None or finite(y) is None:
                    continue
                assert x is not None
                assert y is not None
                points.append(
                    plots.Point(variant.slug, variant.slug, numbers[variant.method], x, y)
                )
            if points:
                level = None if floor is None else floor.figures.get(measure.name)
                drawn.append(
                    plots.pareto(points, summary.measures[name], measure, level, x_falls=falls)
                )
        if drawn:
            made.append({"name": measure.name, "title": measure.title, "drawn": drawn})
    return made
