"""How a study of attention errors is shown: in a terminal, as CSV, and in a document."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dit_accel.eval.attention_errors import COLUMNS
from dit_accel.eval.attention_summary import COURSE, Row, Summary


@dataclass(frozen=True, slots=True)
class Column:
    """A number of a row: heading, which means it is among, its name there, its format."""

    head: str
    source: str
    key: str
    form: str

    def cell(self, row: Row) -> str:
        """The number as text; empty where there is none."""
        value = (getattr(row, self.source) or {}).get(self.key)
        return "" if value is None else format(value, self.form)


ATTENTION: Final = (
    Column("density", "captured", "density", ".3f"),
    Column("mass", "captured", "mass", ".1%"),
    Column("error", "captured", "error", ".4f"),
    Column("synthetic", "synthetic", "error", ".4f"),
    Column("cosine", "captured", "cosine", ".4f"),
    Column("gain", "captured", "gain", ".3f"),
    Column("along o", "captured", "along", ".1%"),
    Column("common", "captured", "common", ".1%"),
    Column("next step", "captured", "step_cosine", ".2f"),
    Column("persistent", "captured", "persistent", ".2f"),
    Column("branches", "captured", "branch_cosine", ".2f"),
    Column("guided", "captured", "guided", ".2f"),
)
"""Of attention alone."""
SYNTHETIC: Final = tuple(
    Column(c.head, "synthetic", c.key, c.form) for c in ATTENTION if c.head != "synthetic"
)
"""The same, on synthetic fields alone."""
GENERATION: Final = (
    Column("density", "generation", "density", ".3f"),
    Column("attention", "captured", "error", ".4f"),
    Column("prediction", "generation", "branch", ".4f"),
    Column("branches", "generation", "branch_cosine", ".2f"),
    Column("guided", "generation", "guided", ".4f"),
    Column("added up", "generation", "added", ".4f"),
    Column("coherence", "generation", "coherence", ".2f"),
    Column("latent", "generation", "latent", ".4f"),
    Column("amplified", "generation", "amplified", ".2f"),
    Column("PSNR dB", "generation", "psnr", ".2f"),
)
"""From attention to the clip."""
TERMS: Final = (
    Column("selected", "captured", "selected", ".1%"),
    Column("cosine", "captured", "term_cosine", ".2f"),
    Column("size", "captured", "term_size", ".2f"),
    Column("synthetic cosine", "synthetic", "term_cosine", ".2f"),
    Column("synthetic size", "synthetic", "term_size", ".2f"),
)
"""Of the first-order term, for rests that have one."""

DISAGREE = "Where they disagree"


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table as text. ``words`` is how many columns, the first ones, hold no numbers."""

    title: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    words: int = 1


def sheets(summary: Summary) -> list[Sheet]:
    """All tables that have a line."""
    captured = [row for row in summary.rows if row.captured is not None]
    synthetic = [row for row in summary.rows if row.synthetic is not None]
    termed = [
        row
        for row in summary.rows
        if any((part or {}).get("term_size") is not None for part in (row.captured, row.synthetic))
    ]
    parts: list[tuple[str, Sequence[Column], Sequence[Row]]] = [
        ("Attention, on the same queries, keys and values", ATTENTION, captured),
        ("Attention, on synthetic fields", SYNTHETIC, [] if captured else synthetic),
        ("The first-order term", TERMS, termed),
        (
            "From attention to the clip",
            GENERATION,
            [row for row in summary.rows if row.generation is not None],
        ),
    ]
    made = [_sheet(title, columns, rows) for title, columns, rows in parts if rows]
    if summary.candidates >= 3:
        lines = tuple((k, "" if v is None else f"{v:.2f}") for k, v in summary.ranks.items())
        title = f"Is the order kept? Over {summary.candidates} candidates"
        made.append(Sheet(title, ("", "Spearman"), lines))
    if summary.turns:
        made.append(
            Sheet(
                DISAGREE,
                ("smaller attention error", "better clip", "the order turns", "PSNR", "prompts"),
                tuple(
                    (t.smaller, t.better, t.link, f"+{t.psnr:.2f}", f"{t.agreeing} of {t.prompts}")
                    for t in summary.turns
                ),
                words=3,
            )
        )
    return made


def _sheet(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Sheet:
    """Of the columns that any row has something in."""
    shown = [column for column in columns if any(column.cell(row) for row in rows)]
    lines = tuple((row.name, *(column.cell(row) for column in shown)) for row in rows)
    return Sheet(title, ("", *(column.head for column in shown)), lines)


def render(summary: Summary) -> list[Table]:
    """The tables, for a terminal."""
    shown = []
    for sheet in sheets(summary):
        table = Table(title=sheet.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
        for i, head in enumerate(sheet.heads):
            table.add_column(head, justify="left" if i < sheet.words else "right", no_wrap=i == 0)
        for line in sheet.lines:
            table.add_row(*line)
        shown.append(table)
    return shown


def markdown(summary: Summary) -> str:
    """The tables, for a document."""
    text = []
    for sheet in sheets(summary):
        marks = ["---" if i < sheet.words else "---:" for i in range(len(sheet.heads))]
        body = [sheet.heads, marks, *sheet.lines]
        lines = "\n".join("| " + " | ".join(cells) + " |" for cells in body)
        text.append(f"**{sheet.title}**\n\n{lines}")
    return "\n\n".join(text) + "\n"


def to_csv(summary: Summary) -> str:
    """One line a candidate, every number in full."""
    plain = ["name", "kind", "layout", "route", "rest", "asked", "calls", "prompts"]
    parts = {
        "captured": (*COLUMNS, "persistent"),
        "synthetic": (*COLUMNS, "persistent"),
        "generation": COURSE,
    }
    text = io.StringIO()
    heads = plain + [f"{part}_{key}" for part, keys in parts.items() for key in keys]
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    for row in summary.rows:
        line: dict[str, Any] = {key: getattr(row, key) for key in plain}
        for part, keys in parts.items():
            values = getattr(row, part) or {}
            line |= {f"{part}_{key}": values.get(key) for key in keys}
        writer.writerow({key: "" if value is None else value for key, value in line.items()})
    return text.getvalue()
