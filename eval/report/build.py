"""From a run's folder to its page."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from dit_accel.errors import InputError
from dit_accel.eval import records
from dit_accel.eval.figures import Summary
from dit_accel.eval.report import attention, opening, plots, tables
from dit_accel.eval.report import clips as clip_room
from dit_accel.eval.report.answers import gain_of
from dit_accel.eval.report.text import setting
from dit_accel.eval.samples import PARTS
from dit_accel.eval.store import Store
from dit_accel.pipelines import media


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
    players = clip_room.players(store, run, samples, summary, clips, numbers)
    data = {
        "players": players,
        "answer": opening.slider(summary, numbers),
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
        head=opening.facts(run, summary, samples),
        gain=gain_of(summary),
        sharing=summary.sharing,
        answers=opening.rows(summary, numbers),
        slider=data["answer"],
        plots=opening.plots_of(summary, numbers),
        players=players,
        tables=tables.tables(summary, numbers),
        absent=tables.absent(summary),
        failures=store.failures(),
        heat=tables.heat(summary, samples),
        bars=tables.bars(summary, numbers),
        parts=PARTS,
        attention=attention.told(store.root / "attention") or [],
        has_maps=data["attention"] is not None,
        attention_command=f"dit-accel eval attention --run {store.root}",
        colours=numbers,
        marker=plots.marker,
        settings=tables.settings(run),
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
