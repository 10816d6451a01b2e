"""``dit-accel eval``: what a method costs in fidelity, and what it gains."""

from __future__ import annotations

import typer

from dit_accel.cli.eval_attention import attention
from dit_accel.cli.eval_report import report
from dit_accel.cli.eval_run import compare, run

app = typer.Typer(help="Measure methods, always against dense attention in the same run.")


@app.callback()
def root() -> None:
    """Measure methods, always against dense attention in the same run."""


app.command("run")(run)
app.command("report")(report)
app.command("compare")(compare)
app.command("attention")(attention)
