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


@app.command()
def crossover(
    methods: Annotated[
        str, typer.Option(help="Of pisa, psa, svg_ear, vmoba, flashblock.")
    ] = "pisa,psa,svg_ear,vmoba,flashblock",
    heads: Annotated[str, typer.Option(help="Attention heads, of all of a batch.")] = "12,24,40",
    budget_ms: Annotated[float, typer.Option(help="Of calls, for each figure.")] = 30.0,
    target: Annotated[
        Path | None, typer.Option("--out", help="JSON; figures of others in it are kept.")
    ] = None,
) -> None:
    """Find from what length on each method is faster than dense attention on this GPU."""
    import torch

    from dit_accel.errors import InputError
    from dit_accel.eval import bench_crossover

    names = methods.split(",")
    for word in names:
        if word not in bench_crossover.SETTINGS:
            known = ", ".join(bench_crossover.SETTINGS)
            raise InputError(f"methods: expected some of {known}, got {word!r}")
    if not all(word.isdigit() and int(word) for word in heads.split(",")):
        raise InputError(f"heads: expected positive integers, got {heads!r}")
    if not torch.cuda.is_available():
        raise InputError("device: expected a GPU, which is what is measured, got none")
    counts = [int(word) for word in heads.split(",")]
    made = bench_crossover.measure(
        names,
        counts,
        budget_ms,
        lambda text: err.print(text, highlight=False, markup=False),
    )
    for row in bench_crossover.lines(made):
        out.print(row, highlight=False, markup=False, soft_wrap=True)
    if target is not None:
        bench_crossover.write(made, target)


@app.command()
def kernels(
    ops: Annotated[
        str, typer.Option(help="Operations, methods, and dense attention to compare with.")
    ] = "dense,methods",
    shapes: Annotated[
        str, typer.Option(help="Of wan14b, wan1.3b, hunyuan, flux.")
    ] = "wan14b,wan1.3b,hunyuan,flux",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda, or cpu for what runs there.")] = "cuda",
    strength: Annotated[
        str, typer.Option("--inputs", help="sharp or broad: how concentrated attention is.")
    ] = "sharp",
    budget_ms: Annotated[float, typer.Option(help="Of calls, for each row.")] = 200.0,
    target: Annotated[Path | None, typer.Option("--out", help="Also write JSON there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Time operations and whole calls of methods at the shapes of real models, on a GPU.

    Everything is checked first, and what is wrong is not timed.
    """
    import torch

    from dit_accel.errors import InputError
    from dit_accel.eval import bench_kernels, records
    from dit_accel.eval.kernel_cases import SHAPES, STRENGTHS
    from dit_accel.pipelines import media

    for name, known, given in (
        ("ops", bench_kernels.ALL_CASES, ops),
        ("shapes", SHAPES, shapes),
        ("dtype", bench_kernels.DTYPES, dtype),
        ("inputs", STRENGTHS, strength),
    ):
        for word in given.split(","):
            if word not in known:
                raise InputError(f"{name}: expected some of {', '.join(known)}, got {word!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: expected one that is here, got 'cuda' without CUDA")
    if target is not None:
        media.check_writable(target, force=force)
    with torch.inference_mode():
        found = bench_kernels.run(
            ops.split(","),
            shapes.split(","),
            dtype=dtype,
            device=device,
            strength=strength,
            budget_ms=budget_ms,
            say=lambda text: err.print(text, highlight=False, markup=False),
        )
    out.print(bench_kernels.table(found["rows"]), highlight=False, markup=False, soft_wrap=True)
    if target is not None:
        media.write_text(target, records.dumps(records.signed(found)))
    if any("error" in row for row in found["rows"]):
        raise typer.Exit(1)
