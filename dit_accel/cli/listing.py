"""``dit-accel methods`` and ``dit-accel models``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dit_accel.cli.common import out


def methods(
    name: Annotated[str | None, typer.Argument(help="One method; all by default.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="A hub id or directory: methods with the settings of their papers."),
    ] = None,
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="Which layouts, routes and rests go together, and their options."
        ),
    ] = False,
) -> None:
    """List the methods with their options, defaults and papers."""
    from dit_accel import presets
    from dit_accel.eval import records

    if table:
        _combinations()
        return
    if model is not None:
        _suggestions(model, name, json)
        return
    chosen = presets.catalogue() if name is None else (presets.get(name),)
    if json:
        typer.echo(records.dumps([_as_dict(preset) for preset in chosen]), nl=False)
        return
    for preset in chosen:
        _show(preset)


def _combinations() -> None:
    from rich.table import Table

    from dit_accel import combinations, components

    every = list(combinations.table())
    reasons = {one.route: one.reason for one in every if one.reason is not None}
    # layouts that are told apart by nothing share a table
    alike: dict[tuple[str | None, ...], list[str]] = {}
    for layout in combinations.LAYOUTS:
        answers = tuple(one.reason for one in every if one.layout == layout)
        alike.setdefault(answers, []).append(layout)
    for answers, layouts in alike.items():
        grid = Table(box=None, padding=(0, 2, 0, 0), title="route (down) with rest (across)")
        grid.add_column("", overflow="fold")
        for rest in combinations.RESTS:
            grid.add_column(rest, justify="center")
        width = len(combinations.RESTS)
        for i, route in enumerate(combinations.ROUTES):
            row = answers[i * width : (i + 1) * width]
            grid.add_row(route, *("yes" if reason is None else "no" for reason in row))
        out.print(f"with layout {', '.join(layouts)}:", highlight=False)
        out.print(grid, highlight=False)
    for route, why in reasons.items():
        out.print(f"{route}: {why}", highlight=False)
    out.print("\nTheir options, for --set layout.tile=4,4,8 or a configuration:", highlight=False)
    for kind, rows in components.COMPONENTS.items():
        for name, component in rows.items():
            options = (f"{key}={_text(o.default)}" for key, o in component.options.items())
            out.print(f"  {kind} {name}: {', '.join(options) or 'none'}", highlight=False)


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


def _suggestions(model: str, name: str | None, json: bool) -> None:
    """A method's settings for a model, as a configuration that names its source."""
    import yaml

    from dit_accel import presets
    from dit_accel.errors import InputError
    from dit_accel.eval import records

    suggested = presets.for_model(model)
    if name is not None and presets.get(name).name not in suggested:
        raise InputError(
            f"method: expected one of {', '.join(suggested)} for {model}, got {name!r}"
        )
    found = [one for one in suggested.values() if name in (None, one.method)]
    if json:
        rows = [{**one.to_config(), "source": one.source, "note": one.note} for one in found]
        typer.echo(records.dumps(rows), nl=False)
        return
    for one in found:
        typer.echo(f"# {one.source}" + (f"\n# differs: {one.note}" if one.note else ""))
        typer.echo(yaml.safe_dump(one.to_config(), sort_keys=False, default_flow_style=None))


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
