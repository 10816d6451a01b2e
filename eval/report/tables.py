"""Figures, densities, times and settings, as the page's tables have them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from dit_accel.eval.figures import Measure, Summary, VariantSummary
from dit_accel.eval.report import plots
from dit_accel.eval.report.answers import methods
from dit_accel.eval.report.text import interval, number
from dit_accel.eval.samples import PARTS, Run, Sample

GROUPS = {
    "fidelity": "Fidelity to dense attention",
    "speed": "Speed, memory and operations",
    "seconds": "Seconds of a sample",
    "semantic": "What the clips show",
    "distribution": "Distribution",
    "vbench": "VBench",
}
"""Of figures, in the order in which they are shown."""


def tables(summary: Summary, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """Figures by group: one row a variant, one column a measure that any variant has."""
    made = []
    for group, title in GROUPS.items():
        columns = [
            measure
            for measure in summary.measures.values()
            if measure.group == group
            and any(measure.name in variant.figures for variant in summary.variants)
        ]
        if not columns:
            continue
        rows = []
        for variant in summary.variants:
            if not variant.samples:
                continue
            rows.append(
                {
                    "slug": variant.slug,
                    "role": variant.role,
                    "colour": numbers.get(variant.method),
                    "cells": [
                        cell(variant, measure, best=_is_best(variant, measure, summary))
                        for measure in columns
                    ],
                }
            )
        made.append({"group": group, "title": title, "columns": columns, "rows": rows})
    return made


def cell(variant: VariantSummary, measure: Measure, *, best: bool) -> dict[str, Any]:
    figure = variant.figures.get(measure.name)
    if figure is None:
        return {"text": None, "why": variant.absent.get(measure.name, "not measured")}
    return {
        "text": number(figure.value, measure) + ("×" if measure.unit == "×" else ""),
        "span": interval(figure, measure),
        "count": figure.count,
        "sort": figure.value if math.isfinite(figure.value) else 1e30,
        "best": best,
    }


def _is_best(variant: VariantSummary, measure: Measure, summary: Summary) -> bool:
    """Whether no other method has a better figure; only of measures that can be better."""
    mine = variant.figures.get(measure.name)
    if measure.better is None or mine is None or variant.role != "method":
        return False
    others = [f.value for v in methods(summary) if (f := v.figures.get(measure.name)) is not None]
    if len(set(others)) < 2:
        return False
    return mine.value == (max(others) if measure.better == "higher" else min(others))


def absent(summary: Summary) -> list[dict[str, Any]]:
    """Measures without a figure, those of one reason together."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for variant in summary.variants:
        for name, why in variant.absent.items():
            lacking.setdefault((name, why), []).append(variant.slug)
    together: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (name, why), slugs in lacking.items():
        title = summary.measures[name].title if name in summary.measures else name
        together.setdefault((why, tuple(slugs)), []).append(title)
    count = len(summary.variants)
    return [
        {
            "title": ", ".join(titles),
            "why": why,
            "who": "" if len(slugs) == count else ", ".join(slugs),
        }
        for (why, slugs), titles in together.items()
    ]


def heat(summary: Summary, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Densities of the methods by layer and step; only by one of them where a run has no more."""
    made = []
    for variant in methods(summary):
        own = [sample.density for sample in samples if sample.variant == variant.slug]
        cells = _mean_cells([density.by_cell for density in own if density.by_cell])
        joint = bool(cells)
        if not joint:
            cells = {step: {0: value} for step, value in variant.by_step.items()}
        total = variant.figures.get("density")
        made.append(
            {
                "slug": variant.slug,
                "svg": plots.heatmap(cells, variant.slug) if cells else "",
                "joint": joint,
                "steps": len(cells),
                "layers": len(next(iter(cells.values()), {})),
                "total": None
                if total is None
                else number(total.value, summary.measures["density"]),
                "by_layer": plots.heatmap({0: variant.by_layer}, variant.slug)
                if variant.by_layer and not joint
                else "",
            }
        )
    return made


def _mean_cells(all_cells: Sequence[dict[int, dict[int, float]]]) -> dict[int, dict[int, float]]:
    if not all_cells:
        return {}
    return {
        step: {layer: fmean(cells[step][layer] for cells in all_cells) for layer in row}
        for step, row in all_cells[0].items()
    }


def bars(summary: Summary, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """Seconds of one sample by part, one bar a variant, on one scale."""
    shown = [variant for variant in summary.variants if sum(variant.breakdown.values()) > 0]
    longest = max((sum(variant.breakdown.values()) for variant in shown), default=1.0)
    return [
        {
            "slug": variant.slug,
            "colour": numbers.get(variant.method),
            "total": sum(variant.breakdown.values()),
            "parts": [
                {
                    "name": part,
                    "seconds": variant.breakdown[part],
                    "width": 100 * variant.breakdown[part] / longest,
                }
                for part in PARTS
                if variant.breakdown.get(part, 0) > 0
            ],
        }
        for variant in shown
    ]


def settings(run: Run) -> list[tuple[str, str]]:
    """Everything that a repetition needs, a line each."""
    chosen, machine = run.settings, run.machine
    lines = [
        ("command", " ".join(run.command)),
        ("model", chosen.model),
        ("fingerprint", chosen.fingerprint or "not taken: a model of a hub"),
        ("clip", f"{chosen.width}×{chosen.height}, {chosen.frames} frames, {chosen.fps} fps"),
        ("denoising", f"{chosen.steps} steps, guidance {chosen.guidance:g}"),
        ("negative prompt", chosen.negative_prompt or "none"),
        ("seeds", ", ".join(map(str, chosen.seeds)) + "; prompt n adds n"),
        ("prompts", str(len(chosen.prompts))),
        ("precision", chosen.dtype),
        ("warm-up", f"{chosen.warmup} steps, not measured"),
        ("device", chosen.device),
        *((name, str(value)) for name, value in machine.items() if value not in (None, [], ())),
        *((name, value) for name, value in run.versions.items() if value is not None),
    ]
    return lines
