"""``dit-accel eval attention``: attention errors beside the fidelity of whole generations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.common import device_of, dtype_of, err, print_wide, progress, quiet

METHODS = "pisa,svg_ear,psa,vmoba,flashblock"


def attention(
    target: Annotated[
        Path | None, typer.Option("--out", help="Folder of the study; taken up if there.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="A run whose methods and settings are taken; its report shows the maps."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="An embedded model, a directory, or a hub id.")
    ] = "tiny-wan",
    methods: Annotated[str, typer.Option(help="Presets, by comma; none for no presets.")] = METHODS,
    combine: Annotated[
        str,
        typer.Option(
            "--combinations",
            help="Patterns of layout/route/rest, by comma, such as gilbert/topk/*; all, or none.",
        ),
    ] = "none",
    density: Annotated[str, typer.Option(help="In (0, 1]; several by comma.")] = "0.15",
    block_size: Annotated[int | None, typer.Option(help="Tokens in a block.")] = None,
    prompts: Annotated[
        str, typer.Option(help="builtin (of the embedded model), or a text file, one a line.")
    ] = "builtin",
    limit: Annotated[int, typer.Option(help="Take the first prompts; 0 for none.")] = 1,
    layers: Annotated[str, typer.Option(help="Captured: auto, all, or such as 0,2,-1.")] = "auto",
    at: Annotated[str, typer.Option(help="Captured steps: auto, all, or such as 0,1,-1.")] = "auto",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt, and the first field.")] = 0,
    synthetic: Annotated[int, typer.Option(help="How many synthetic fields.")] = 1,
    grid: Annotated[str, typer.Option(help="Of the synthetic fields.")] = "5x16x16",
    generations: Annotated[
        bool | None,
        typer.Option(
            "--generations/--no-generations",
            help="Also generate clips with every candidate; done unless there is a --run.",
        ),
    ] = None,
    maps: Annotated[
        bool,
        typer.Option("--maps/--no-maps", help="Also map the pairs of blocks, for the report."),
    ] = True,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
) -> None:
    """Measure methods on the attention of a real generation, and what the clip makes of it.

    The dense generation's queries, keys and values are captured, and every method and combination
    is run on them: error, cosine, and what tells harmless errors from harmful ones. Beside it stand
    whole generations, free and put back on the dense trajectory after every step. Methods with
    memory (flashblock, k-means) are measured as they run only with --at all.
    """
    from dit_accel.errors import InputError

    numbers = _densities(density)
    for name, value in (("limit", limit), ("synthetic", synthetic)):
        if value < 0:
            raise InputError(f"{name}: expected 0 or more, got {value}")
    if target is None and run is None:
        raise InputError("out: expected a folder, or a --run to put it into, got neither")
    quiet()
    from dit_accel.eval import attention_study, attention_summary, attention_tables, records
    from dit_accel.eval.candidates import candidates, of_run
    from dit_accel.eval.prompts import prompts_of
    from dit_accel.eval.store import Store
    from dit_accel.pipelines import media

    settings = None if run is None else Store(run).run().settings
    target = target or Path(str(run)) / "attention"
    if settings is not None:
        model, device, dtype = settings.model, settings.device, settings.dtype
    chosen = candidates(
        [] if methods == "none" or settings is not None else _words(methods),
        {"none": [], "all": ["*"]}.get(combine, _words(combine)),
        densities=numbers,
        model=model,
        options={} if block_size is None else {"block_size": block_size},
    )
    study = attention_study.Study(
        model=model,
        prompts=(),
        layers=layers,
        at=at,
        steps=steps,
        guidance=guidance,
        seed=seed,
        synthetic=synthetic,
        grid=_grid(grid),
        generate=settings is None if generations is None else generations,
        maps=maps,
        device=device_of(device),
        dtype=dtype_of(dtype),
    )
    if settings is not None:
        chosen = [*of_run(settings), *chosen]
        study = attention_study.like_run(study, settings, limit)
    elif limit:
        texts = tuple(one.text for one in prompts_of(prompts, model, limit))
        study = replace(study, prompts=texts)
    with progress() as bars:
        tasks: dict[str, int] = {}

        def told(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)  # type: ignore[arg-type]

        measured = attention_study.run(study, chosen, target, told)
    summary = attention_summary.summarise(measured)
    media.write_text(
        target / "summary.json", records.dumps(records.signed({"summary": summary.to_dict()}))
    )
    media.write_text(target / "summary.csv", attention_tables.to_csv(summary))
    media.write_text(target / "summary.md", attention_tables.markdown(summary))
    for table in attention_tables.render(summary):
        print_wide(table)
    err.print(f"written  {target}", highlight=False, soft_wrap=True)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _densities(text: str) -> list[float]:
    from dit_accel.errors import InputError

    try:
        found = [float(word) for word in _words(text)]
    except ValueError:
        found = []
    if not found or not all(0 < value <= 1 for value in found):
        raise InputError(f"density: expected numbers in (0, 1], by comma, got {text!r}")
    return found


def _grid(text: str) -> tuple[int, int, int]:
    from dit_accel.errors import InputError

    words = text.split("x")
    if len(words) != 3 or not all(word.isdecimal() and int(word) for word in words):
        raise InputError(f"grid: expected frames x rows x columns such as 5x16x16, got {text!r}")
    frames, rows, columns = map(int, words)
    return frames, rows, columns
