"""``dit-accel eval report``: the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.common import out, progress, quiet


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    clips: Annotated[
        int, typer.Option(help="Prompts whose clips are in the players, evenly chosen.")
    ] = 24,
    features: Annotated[
        str | None,
        typer.Option(help="Feature network of FID and KID, to compute the figures anew with."),
    ] = None,
    real: Annotated[
        Path | None,
        typer.Option(help="Folder of real clips or images, to compute the figures anew with."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes that share figures to be computed.")] = 1,
) -> None:
    """Write report.html, summary.json and summary.csv into the run's folder.

    The page needs no network; the clips lie beside it in the folder. Where
    ``dit-accel eval attention --run RUN`` was run before, it shows maps of attention.
    """
    quiet()
    from dit_accel.errors import InputError
    from dit_accel.eval import export, report
    from dit_accel.eval.looks import Choices
    from dit_accel.eval.store import Store
    from dit_accel.eval.summary import summarise

    if clips < 1:
        raise InputError(f"clips: expected a positive integer, got {clips}")
    if jobs < 1:
        raise InputError(f"jobs: expected a positive integer, got {jobs}")
    store = Store(run)
    store.run()
    kept = export.read(run) if (run / "summary.json").is_file() else None
    if kept is None or not kept.complete or features is not None or real is not None:
        with progress() as bars:
            task = bars.add_task("figures", total=None)
            kept = summarise(
                store,
                Choices(features or "auto", real),
                lambda done, total: bars.update(task, completed=done, total=total),
                jobs=jobs,
            )
        export.write(store, kept)
    path = report.write(store, kept, clips=clips)
    out.print(f"written  {path}", highlight=False, soft_wrap=True)
