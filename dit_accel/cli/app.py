"""All commands, by name."""

from __future__ import annotations

from typing import Annotated

import typer

from dit_accel.cli import bench, doctor, evaluate, figure, generate, listing, tiny_wan, tune
from dit_accel.cli.config import with_config

app = typer.Typer(
    name="dit-accel",
    help="Diffusion transformers made faster by sparse attention, without retraining.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        import dit_accel

        typer.echo(f"dit-accel {dit_accel.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Diffusion transformers made faster by sparse attention, without retraining."""


app.command("generate")(with_config(generate.generate))
app.command("methods")(listing.methods)
app.command("models")(listing.models)
app.command("doctor")(doctor.doctor)
app.command("tune-kernels")(tune.tune_kernels)
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="eval")
app.add_typer(figure.app, name="figure")
app.add_typer(tiny_wan.train_app, name="train")
app.add_typer(tiny_wan.check_app, name="check")
