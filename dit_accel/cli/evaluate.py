"""``dit-accel eval``: what a method costs in fidelity, and what it gains."""

from __future__ import annotations

import typer

from dit_accel.cli.eval_attention import attention

app = typer.Typer(help="Measure methods, always against dense attention in the same run.")


@app.callback()
def root() -> None:
    """Measure methods, always against dense attention in the same run."""


app.command("attention")(attention)
