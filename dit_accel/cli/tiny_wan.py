"""``dit-accel train tiny-wan`` and ``dit-accel check tiny-wan``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.cli.common import (
    device_of,
    dtype_of,
    err,
    method_options,
    out,
    progress,
    quiet,
)
from dit_accel.errors import InputError

train_app = typer.Typer(help="Train an embedded model from its recipe.")
check_app = typer.Typer(help="Judge what an embedded model generates.")


@train_app.callback()
def train_root() -> None:
    """Train an embedded model from its recipe."""


@check_app.callback()
def check_root() -> None:
    """Judge what an embedded model generates."""


@train_app.command("tiny-wan")
def train(
    target: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up the run found there.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A number of the recipe; repeatable."),
    ] = None,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile the transformer's blocks.")
    ] = False,
) -> None:
    """Train autoencoder, text encoder and transformer; the weights land in OUT/weights."""
    from dit_accel.pipelines.tiny_wan.recipe import Recipe

    recipe = _recipe(settings or ())
    quiet()
    from dit_accel.pipelines.tiny_wan.train import train as run

    weights = run(
        target,
        recipe,
        device=device_of(device),
        resume=resume,
        compile_blocks=compile_blocks,
        log=_log,
    )
    assert isinstance(recipe, Recipe)
    out.print(f"weights  {weights}", highlight=False, soft_wrap=True)


def _recipe(words: list[str] | tuple[str, ...]) -> Any:
    from dit_accel.options import closest
    from dit_accel.pipelines.tiny_wan.recipe import Recipe

    known = {field.name: field for field in fields(Recipe)}
    chosen: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in known:
            raise InputError(
                f"--set: expected one of {', '.join(known)} with =value, got {word!r}"
                f"{closest(name, known)}"
            )
        kind: type = type(known[name].default)
        try:
            chosen[name] = kind(text)
        except ValueError:
            raise InputError(f"{name}: expected {kind.__name__}, got {text!r}") from None
    return Recipe(**chosen)


def _log(record: dict[str, Any]) -> None:
    told = "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in record.items()
    )
    out.print(told, highlight=False, soft_wrap=True)


@check_app.command("tiny-wan")
def check(
    method: Annotated[str, typer.Option(help="Compared with dense.")] = "pisa",
    density: Annotated[float | None, typer.Option(help="In (0, 1].")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Option of the method.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="How many, of held-out combinations.")] = 64,
    batch: Annotated[int, typer.Option(help="Clips at once.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    target: Annotated[Path | None, typer.Option("--out", help="Also write JSON there.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write a contact sheet of some prompts (png).")
    ] = None,
    rows: Annotated[
        int, typer.Option(help="Prompts on the contact sheet, evenly from the first to the last.")
    ] = 6,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Generate prompts of held-out combinations densely and by a method, and judge both."""
    from dit_accel import presets
    from dit_accel.pipelines import embedded, media

    rows = min(rows, prompts)
    if rows < 1:
        raise InputError(f"rows: expected a positive integer, got {rows}")
    for path in (target, sheet):
        if path is not None:
            media.check_writable(path, force=force)
    options = embedded.options_for(
        "tiny-wan", method, method_options(method, density, settings or ())
    )
    quiet()
    from dit_accel.eval import prompt_check, records
    from dit_accel.eval.contact_sheet import contact_sheet

    shown = [(2 * i + 1) * prompts // (2 * rows) for i in range(rows)]
    kept: dict[str, list[Any]] = {}

    def keep(name: str, number: int, frames: Any) -> None:
        if number in shown:
            kept.setdefault(name, []).append(frames)

    with progress() as bars:
        tasks: dict[str, Any] = {}

        def step(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        result = prompt_check.run(
            {method: presets.build(method, **options)},
            prompts=prompts,
            batch=batch,
            steps=steps,
            guidance=guidance,
            seed=seed,
            device=device_of(device),
            dtype=dtype_of(dtype),
            progress=step,
            keep=keep,
        )
    out.print(prompt_check.render(result))
    if sheet is not None:
        captions = [result.methods[0].clips[number].prompt for number in shown]
        image = contact_sheet(kept, captions)
        media.replace_with(sheet, lambda part: image.save(part, format="PNG"))
    if target is not None:
        media.write_text(target, records.dumps(records.signed(result.to_dict())))
        err.print(f"written  {target}", highlight=False, soft_wrap=True)
