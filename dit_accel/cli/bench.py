"""``dit-accel bench``: measurements that anyone can repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.common import device_of, dtype_of, err, out, parse_set, progress, quiet

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


@app.command("first-use")
def first_use(
    methods: Annotated[
        str, typer.Option(help="Of pisa, pisa_moment, svg_ear, psa, vmoba, flashblock.")
    ] = "pisa,pisa_moment,svg_ear,psa,vmoba,flashblock",
    shape: Annotated[str, typer.Option(help="wan14b, wan1.3b, hunyuan or flux.")] = "wan1.3b",
    target: Annotated[Path | None, typer.Option("--out", help="Also write JSON there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Time the first use of each method on this GPU, in new processes: with nothing compiled yet,
    and with the compiled kernels on disk.
    """
    import torch

    from dit_accel.errors import InputError
    from dit_accel.eval import bench_first_use, records
    from dit_accel.eval.kernel_cases import SHAPES
    from dit_accel.pipelines import media

    names = methods.split(",")
    for name, known, given in (
        ("methods", bench_first_use.METHODS, names),
        ("shape", SHAPES, [shape]),
    ):
        for word in given:
            if word not in known:
                raise InputError(f"{name}: expected some of {', '.join(known)}, got {word!r}")
    if not torch.cuda.is_available():
        raise InputError("device: expected a GPU, which kernels are compiled for, got none")
    if target is not None:
        media.check_writable(target, force=force)
    found = bench_first_use.run(
        names,
        shape=shape,
        say=lambda text: err.print(text, highlight=False, markup=False, soft_wrap=True),
    )
    table = "\n".join(bench_first_use.lines(found["rows"]))
    out.print(table, highlight=False, markup=False, soft_wrap=True)
    if target is not None:
        media.write_text(target, records.dumps(records.signed(found)))
    if any(bench_first_use.failure(row) for row in found["rows"]):
        raise typer.Exit(1)


@app.command()
def pipeline(
    models: Annotated[
        str, typer.Option(help="Of wan1.3b, wan14b, hunyuan, flux, with commas; or tiny.")
    ] = "wan1.3b",
    methods: Annotated[
        str, typer.Option(help="With commas; dense attention is always there.")
    ] = "pisa",
    density: Annotated[
        float | None, typer.Option(help="In (0, 1], for methods that have this option.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.NAME=VALUE", help="Option of a method; repeatable."),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(help="Two numbers of layers, from which times are extrapolated; or none."),
    ] = "1,4",
    whole: Annotated[
        bool, typer.Option("--whole", help="Also time the real number of layers.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Elements of one forward.")] = 1,
    steps: Annotated[
        int, typer.Option(help="Denoising steps of a run, of which the mean step is made.")
    ] = 50,
    backend: Annotated[
        str | None,
        typer.Option(help="Of dense attention: cudnn, flash or sdpa; by default the first."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Turns of all methods.")] = 5,
    each: Annotated[int, typer.Option(help="Forwards of every kind of step in a turn.")] = 3,
    splits: Annotated[
        int, typer.Option(help="Turns of the pass that divides the time; 0 leaves it out.")
    ] = 2,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and inputs.")] = 0,
    target: Annotated[Path | None, typer.Option("--out", help="Also write JSON there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Time forwards of whole transformers of real dimensions, with random weights.

    Every method is checked first. Fidelity is not measured. Times of the real number of layers come
    from two small numbers of them, or from all with --whole.
    """
    import torch

    from dit_accel import presets
    from dit_accel.cli.common import device_of, dtype_of, quiet, shared_options
    from dit_accel.errors import InputError
    from dit_accel.eval import records
    from dit_accel.pipelines import media

    chosen = device_of(device)
    if chosen not in ("cpu", "cuda") or (chosen == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"device: expected one that is here, cpu or cuda, got {chosen!r}")
    words = [word.strip() for word in methods.split(",")]
    shared = shared_options(settings)
    for name in shared:
        if name not in words:
            raise InputError(f"--set: expected options of {', '.join(words)}, got {name!r}")
    made = {}
    for name in words:
        given = dict(shared.get(name, {}))
        if density is not None and "density" in presets.get(name).accepts(given):
            given.setdefault("density", density)
        if name != "dense":
            # a method that steps aside for dense attention is not what was asked for
            given.setdefault("dense_below", 0)
            made[name] = presets.build(name, **given)
        elif given:
            raise InputError("--set: expected no options of dense, use --backend")
    counts = None
    if layers != "none":
        try:
            first, second = (int(word) for word in layers.split(","))
        except ValueError:
            raise InputError(f"layers: expected two numbers with a comma, got {layers!r}") from None
        counts = first, second
    if target is not None:
        media.check_writable(target, force=force)
    quiet()
    from dit_accel.eval import bench_pipeline, pipeline_tables

    asked = bench_pipeline.Asked(
        made,
        dtype=dtype_of(dtype or ("bf16" if chosen == "cuda" else "fp32")),
        device=chosen,
        batch=batch,
        backend=backend or ("cudnn" if chosen == "cuda" else "sdpa"),
        num_steps=steps,
        repeats=repeats,
        each=each,
        splits=splits,
        seed=seed,
    )
    with torch.inference_mode():
        found = bench_pipeline.run(
            models.split(","),
            asked,
            layers=counts,
            whole=whole,
            say=lambda text: err.print(text, highlight=False, markup=False, soft_wrap=True),
        )
    out.print(pipeline_tables.table(found), highlight=False, markup=False, soft_wrap=True)
    err.print(pipeline_tables.NOTE, highlight=False, soft_wrap=True)
    if target is not None:
        media.write_text(target, records.dumps(records.signed(found)))
    if any(model["wrong"] for model in found["models"].values()):
        raise typer.Exit(1)


@app.command()
def recording(
    methods: Annotated[str, typer.Option(help="Presets, with commas.")] = "dense,pisa",
    density: Annotated[
        float | None, typer.Option(help="In (0, 1], for methods that have this option.")
    ] = 0.15,
    model: Annotated[str, typer.Option(help="Name, directory or hub id.")] = "tiny-wan",
    prompt: Annotated[
        str, typer.Option(help="What is generated.")
    ] = "a red circle moves right over a blue background",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed pairs of generations.")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    target: Annotated[Path | None, typer.Option("--out", help="Also write JSON there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Time what it costs that ``eval run`` records where the time of a generation goes."""
    from dit_accel import presets
    from dit_accel.pipelines import embedded, media

    if target is not None:
        media.check_writable(target, force=force)
    chosen = {}
    for name in (word.strip() for word in methods.split(",")):
        given = {} if density is None else {"density": density}
        given = {key: value for key, value in given.items() if key in presets.get(name).accepts({})}
        chosen[name] = presets.build(name, **embedded.options_for(model, name, given))
    quiet()
    from dit_accel.eval import bench_recording, records
    from dit_accel.pipelines import load
    from dit_accel.pipelines.request import Request

    pipe = load(model, device=device_of(device), dtype=dtype_of(dtype))
    pipe.set_progress_bar_config(disable=True)
    with progress() as bars:
        task = bars.add_task("generations", total=None)
        found = bench_recording.run(
            pipe,
            chosen,
            Request(prompt, steps=steps),
            repeats,
            lambda done, total: bars.update(task, completed=done, total=total),
        )
    out.print(bench_recording.table(found))
    if target is not None:
        told = {"methods": [one.to_dict() for one in found]}
        media.write_text(target, records.dumps(records.signed(told)))
