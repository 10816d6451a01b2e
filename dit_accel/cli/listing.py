"""``dit-accel methods`` and ``dit-accel models``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dit_accel.cli.common import out


def methods(
    name: Annotated[str | None, typer.Argument(help="One method; all by default.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Which routes and rests go together.")
    ] = False,
) -> None:
    """List the methods with their options, defaults and papers."""
    from dit_accel import presets
    from dit_accel.eval import records

    if table:
        _combinations()
        return
    chosen = presets.catalogue() if name is None else (presets.get(name),)
    if json:
        typer.echo(records.dumps([_as_dict(preset) for preset in chosen]), nl=False)
        return
    for preset in chosen:
        _show(preset)


def _combinations() -> None:
    from rich.table import Table

    from dit_accel import combinations

    grid = Table(box=None, padding=(0, 2, 0, 0), title="route (down) with rest (across)")
    grid.add_column("", overflow="fold")
    for rest in combinations.RESTS:
        grid.add_column(rest, justify="center")
    reasons: dict[str, str] = {}
    rows: dict[str, list[str]] = {}
    for pair in combinations.table():
        rows.setdefault(pair.route, []).append("yes" if pair.reason is None else "no")
        if pair.reason is not None:
            reasons[pair.route] = pair.reason
    for route, cells in rows.items():
        grid.add_row(route, *cells)
    out.print(grid, highlight=False)
    for route, reason in reasons.items():
        out.print(f"{route}: {reason}", highlight=False)
    out.print("Every layout goes with all of these.", highlight=False)


def _as_dict(preset: Any) -> dict[str, Any]:
    paper = preset.paper
    return {
        "name": preset.name,
        "summary": preset.summary,
        "paper": None if paper is None else {"title": paper.title, "arxiv": paper.arxiv},
        "deviations": list(preset.deviations),
        "options": [
            {"name": o.name, "type": o.type, "default": o.default, "help": o.help}
            for o in preset.options.values()
        ],
    }


def _show(preset: Any) -> None:
    from rich.table import Table

    out.print(f"[bold]{preset.name}[/bold]  {preset.summary}", highlight=False)
    if preset.paper is not None:
        out.print(f"  {preset.paper.title}, arXiv {preset.paper.arxiv}", highlight=False)
    if preset.options:
        table = Table(box=None, padding=(0, 2, 0, 2))
        for heading in ("option", "default", "takes", "what it does"):
            table.add_column(heading, overflow="fold")
        for option in preset.options.values():
            table.add_row(option.name, _text(option.default), option.type, option.help)
        out.print(table, highlight=False)
    for deviation in preset.deviations:
        out.print(f"  differs: {deviation}", highlight=False)
    out.print()


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def models() -> None:
    """List the embedded models, and the pipelines that can be loaded beside them."""
    from dit_accel.pipelines import embedded, families

    for model in embedded.catalogue():
        out.print(f"[bold]{model.name}[/bold]  {model.summary}", highlight=False)
        given = ", ".join(f"{key}={value}" for key, value in model.defaults.items())
        out.print(f"  made for {given}, {model.fps} frames per second", highlight=False)
        given = ", ".join(f"{key}={value}" for key, value in model.method_options.items())
        out.print(f"  suggests for methods: {given}", highlight=False)
    out.print(
        "\nBeside these, any diffusers pipeline with a "
        f"{' or '.join(families.supported())}, by directory or hub id.",
        highlight=False,
    )
