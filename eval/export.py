"""The figures of a run on disk, and as a table."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from dit_accel.eval import records
from dit_accel.eval.figures import Figure, Summary
from dit_accel.eval.metrics import vbench
from dit_accel.eval.store import Store, parse
from dit_accel.pipelines import media

_COLUMNS = (
    ("density", ".3f"), ("psnr", ".1f"), ("latent_error", ".2g"), ("kid_dense", ".2g"),
    ("all_three", ".2f"), ("speedup", ".2f"), ("seconds", ".1f"),
)  # fmt: skip


def write(store: Store, summary: Summary) -> None:
    """``summary.json``, ``summary.csv`` and VBench's layout, into the run's folder."""
    media.write_text(store.root / "summary.json", records.dumps(summary))
    media.write_text(store.root / "summary.csv", as_csv(summary))
    folder = store.root / "vbench"
    folder.mkdir(exist_ok=True)
    for variant in summary.variants:
        scores = {
            name: {
                f"samples/{variant.slug}/{sample}/clip.mp4": value
                for sample, value in variant.each.get(name, {}).items()
            }
            for name in vbench.DIMENSIONS
        }
        path = folder / f"{variant.slug}_eval_results.json"
        media.write_text(path, records.dumps(vbench.layout(scores)))


def read(root: Path | str) -> Summary:
    """``summary.json`` of a run's folder.

    Raises:
        InputError: there is none, or it is of another format.
    """
    return parse(Summary, Path(root) / "summary.json")


def as_csv(summary: Summary) -> str:
    """A row for every variant and measure; what is absent has a reason in place of a value."""
    text = io.StringIO()
    rows: Any = csv.writer(text, lineterminator="\n")
    rows.writerow(["variant", "measure", "value", "low", "high", "count", "unit", "absent"])
    for variant in summary.variants:
        for name, measure in summary.measures.items():
            figure = variant.figures.get(name)
            if figure is None:
                rows.writerow(
                    [variant.slug, name, "", "", "", 0, measure.unit, variant.absent[name]]
                )
            else:
                bounds = ["" if b is None else repr(b) for b in (figure.low, figure.high)]
                rows.writerow(
                    [
                        variant.slug,
                        name,
                        repr(figure.value),
                        *bounds,
                        figure.count,
                        measure.unit,
                        "",
                    ]
                )
    return text.getvalue()


def told(figure: Figure | None, spec: str = ".2f", between: str = " ") -> str:
    """A figure for a table: value and interval, with something between."""
    if figure is None:
        return "n/a"
    if math.isinf(figure.value):
        return "equal" if figure.value > 0 else "n/a"
    if figure.low is None or figure.high is None:
        return f"{figure.value:{spec}}"
    value, low, high = (f"{x:{spec}}" for x in (figure.value, figure.low, figure.high))
    return f"{value}{between}{low}..{high}"


def table(summary: Summary) -> Table:
    """What to look at first, a row a variant."""
    made = Table(
        title="against dense attention, same prompts and seeds; below a figure its 95% interval",
        box=None,
        padding=(0, 2, 0, 0),
    )
    made.add_column("", overflow="fold")
    shown = [
        (name, spec)
        for name, spec in _COLUMNS
        if any(name in variant.figures for variant in summary.variants)
    ]
    made.add_column("n", justify="right")
    for name, _ in shown:
        measure = summary.measures[name]
        unit = f"\n({measure.unit})" if measure.unit else ""
        made.add_column(measure.title + unit, justify="right", no_wrap=True)
    for variant in summary.variants:
        cells = [told(variant.figures.get(name), spec, "\n") for name, spec in shown]
        made.add_row(variant.slug, str(variant.samples), *cells)
    return made
