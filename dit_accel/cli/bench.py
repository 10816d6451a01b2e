"""``dit-accel bench``: measurements that anyone can repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.common import err, out, parse_set

app = typer.Typer(help="Measure, always as a ratio to dense attention in the same run.")


@app.callback()
def root() -> None:
    """Measure, always as a ratio to dense attention in the same run."""


@app.command()
def attention(
    tokens: Annotated[int, typer.Option(help="Video tokens.")] = 16384,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    method: Annotated[str, typer.Option(help="See dit-accel methods.")] = "pisa",
    density: Annotated[float | None, typer.Option(help="In (0, 1].")] = 0.15,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Option of the method.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed pairs of runs.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    target: Annotated[Path | None, typer.Option("--out", help="Also write JSON there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Time one attention call of a method against dense attention, and its memory."""
    from dit_accel.eval import bench_attention, records
    from dit_accel.pipelines import media

    if target is not None:
        media.check_writable(target, force=force)
    options = parse_set(method, settings or ())
    with err.status("measuring"):
        result = bench_attention.run(
            tokens=tokens,
            heads=heads,
            head_dim=head_dim,
            density=density,
            method=method,
            repeats=repeats,
            threads=threads,
            device=device,
            dtype=dtype,
            seed=seed,
            options=options,
        )
    out.print(bench_attention.render(result))
    if target is not None:
        media.write_text(target, records.dumps(records.signed(result.to_dict())))
