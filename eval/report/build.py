"""From a run's folder to its page."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2

from dit_accel.errors import InputError
from dit_accel.eval import records
from dit_accel.eval.figures import Measure, Summary, VariantSummary
from dit_accel.eval.report import attention, plots
from dit_accel.eval.report.answers import (
    answers,
    best_of,
    finite,
    gain_of,
    methods,
)
from dit_accel.eval.report.pictures import poster
from dit_accel.eval.report.text import interval, number, setting, with_unit
from dit_accel.eval.samples import PARTS, Key, Run, Sample
from dit_accel.eval.store import Store
from dit_accel.pipelines import media

GROUPS = {
    "fidelity": "Fidelity to dense attention",
    "speed": "Speed and memory",
    "semantic": "What the clips show",
    "distribution": "Distribution",
    "vbench": "VBench",
}
"""Of figures, in the order in which they are shown."""


def write(store: Store, summary: Summary, *, clips: int = 24) -> Path:
    """Write ``report.html`` into a run's folder, whole or not at all.

    Args:
        store: the run.
        summary: of it.
        clips: prompts whose clips are in the players, evenly from the first to the last.

    Raises:
        InputError: the run holds no sample, or ``clips`` is below 1.
    """
    path = store.root / "report.html"
    media.write_text(path, render(store, summary, clips=clips))
    return path


def render(store: Store, summary: Summary, *, clips: int = 24) -> str:
    """The page as text; arguments and errors as of `write`."""
    if clips < 1:
        raise InputError(f"clips: expected a positive integer, got {clips}")
    run, samples = store.run(), store.samples()
    if not samples:
        raise InputError(f"report: expected a run with samples, got {str(store.root)!r}")
    numbers = colours(summary)
    players = _players(store, run, samples, summary, clips)
    data = {
        "players": players,
        "answer": _slider(summary, numbers),
        "attention": attention.maps_of(store.root / "attention"),
    }
    style, script = _file("style.css"), _file("script.js")
    page = _environment().get_template("report.html")
    return page.render(
        title=f"{run.settings.model}: {', '.join(numbers)}",
        policy=_policy(script),
        style=style,
        script=script,
        data=_embedded(data),
        run=run,
        summary=summary,
        head=_head(run, summary, samples),
        gain=gain_of(summary),
        answers=_answers(summary, numbers),
        slider=data["answer"],
        plots=_plots(summary, numbers),
        players=players,
        tables=_tables(summary, numbers),
        absent=_absent(summary),
        failures=store.failures(),
        heat=_heat(summary, samples),
        bars=_bars(summary, numbers),
        parts=PARTS,
        attention=attention.told(store.root / "attention"),
        attention_command=f"dit-accel eval attention --run {store.root}",
        colours=numbers,
        marker=plots.marker,
        settings=_settings(run),
        settings_json=records.dumps(run.settings),
        variants=[(v, setting(v.given), setting(v.options)) for v in run.settings.variants],
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.created)),
    )


def colours(summary: Summary) -> dict[str, int]:
    """A number for every method, in the order of the run."""
    names = dict.fromkeys(v.method for v in summary.variants if v.role == "method")
    return {name: i for i, name in enumerate(names)}


def _file(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _file(f"{name}.j2")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return made


def _policy(script: str) -> str:
    """A policy that lets the page load nothing but what lies beside it, and run one script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src 'self' file: data:; media-src 'self' file:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )


def _embedded(data: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(json.loads(records.dumps(data)), ensure_ascii=False).replace("<", "\\u003c")


# --- the answer -----------------------------------------------------------------------------------


def _head(run: Run, summary: Summary, samples: Sequence[Sample]) -> dict[str, Any]:
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


def _answers(summary: Summary, numbers: dict[str, int]) -> list[dict[str, Any]]:
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
                    _cell(best, summary.measures[name], best=False)
                    for name in ("psnr", "speedup", "density")
                ],
            }
        rows.append(row)
    return rows


_BUDGETS = ("density", "p", "threshold", "ratios")
"""Options that say how much a method computes."""


def _asked(variant: VariantSummary) -> str:
    """What a variant was set to, in few words."""
    return setting({name: variant.options.get(name) for name in _BUDGETS})


def _slider(summary: Summary, numbers: dict[str, int]) -> dict[str, Any] | None:
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


# --- figures --------------------------------------------------------------------------------------


def _plots(summary: Summary, numbers: dict[str, int]) -> list[dict[str, Any]]:
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


def _tables(summary: Summary, numbers: dict[str, int]) -> list[dict[str, Any]]:
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
                        _cell(variant, measure, best=_is_best(variant, measure, summary))
                        for measure in columns
                    ],
                }
            )
        made.append({"group": group, "title": title, "columns": columns, "rows": rows})
    return made


def _cell(variant: VariantSummary, measure: Measure, *, best: bool) -> dict[str, Any]:
    figure = variant.figures.get(measure.name)
    if figure is None:
        return {"text": None, "why": variant.absent.get(measure.name, "not measured")}
    return {
        "text": number(figure.value, measure)
        + ("×" if measure.unit == "×" else ""),
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


def _absent(summary: Summary) -> list[dict[str, Any]]:
    """Measures without a figure, by reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for variant in summary.variants:
        for name, why in variant.absent.items():
            reasons.setdefault((name, why), []).append(variant.slug)
    count = len(summary.variants)
    return [
        {
            "title": summary.measures[name].title if name in summary.measures else name,
            "why": why,
            "who": "" if len(slugs) == count else ", ".join(slugs),
        }
        for (name, why), slugs in reasons.items()
    ]


# --- clips ----------------------------------------------------------------------------------------


def _players(
    store: Store, run: Run, samples: Sequence[Sample], summary: Summary, clips: int
) -> dict[str, Any]:
    """What the players show: prompts, and the clips of every variant."""
    by_key = {sample.key: sample for sample in samples}
    numbers = colours(summary)
    wanted = [
        (prompt, seed + prompt.number)
        for prompt in run.settings.prompts
        for seed in run.settings.seeds
        if any(
            Key(v.slug, prompt.number, seed + prompt.number) in by_key
            for v in run.settings.variants
        )
    ]
    if len(wanted) > clips:
        wanted = [wanted[(2 * i + 1) * len(wanted) // (2 * clips)] for i in range(clips)]
    rows = []
    for prompt, seed in wanted:
        shown = []
        for variant in run.settings.variants:
            sample = by_key.get(Key(variant.slug, prompt.number, seed))
            if sample is None:
                continue
            each = summary.variant(variant.slug).each
            frames = store.frames(sample.key)
            shown.append(
                {
                    "variant": variant.slug,
                    "role": variant.role,
                    "colour": numbers.get(variant.method),
                    "file": store.media(sample.key).relative_to(store.root).as_posix(),
                    "poster": poster(frames[len(frames) // 2]),
                    "notes": _notes(sample, each, summary),
                }
            )
        rows.append({"text": prompt.text, "seed": seed, "clips": shown})
    return {
        "fps": run.settings.fps,
        "frames": run.settings.frames,
        "ratio": run.settings.width / run.settings.height,
        "prompts": rows,
        "left_out": len(run.settings.prompts) * len(run.settings.seeds) - len(rows),
    }


def _notes(
    sample: Sample, each: dict[str, dict[str, float]], summary: Summary
) -> list[str]:
    """What is told under a clip."""
    found = []
    for name in ("psnr", "speedup"):
        value = each.get(name, {}).get(sample.key.name)
        if value is not None and sample.variant != "dense":
            measure = summary.measures[name]
            found.append(with_unit(value, measure))
    if sample.variant == "dense":
        return [*found, f"{sample.seconds.denoise:.2f} s"]
    return [*found, f"density {sample.density.total:.3f}"]


# --- density and settings -------------------------------------------------------------------------


def _heat(summary: Summary, samples: Sequence[Sample]) -> list[dict[str, Any]]:
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
                "total": None if total is None else number(total.value),
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


def _bars(summary: Summary, numbers: dict[str, int]) -> list[dict[str, Any]]:
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


def _settings(run: Run) -> list[tuple[str, str]]:
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


