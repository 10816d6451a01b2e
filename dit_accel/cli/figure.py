"""``dit-accel figure``: pictures of what the methods do, made from a model's own attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.common import device_of, err, progress, quiet
from dit_accel.errors import InputError

app = typer.Typer(help="Draw what the methods do, from a model's own attention.")


@app.callback()
def root() -> None:
    """Draw what the methods do, from a model's own attention."""


@app.command()
def plans(
    target: Annotated[Path, typer.Option("--out", help="PNG to write.")],
    prompt: Annotated[
        str, typer.Option(help="What is generated.")
    ] = "two blue stars spin over a black background",
    model: Annotated[str, typer.Option(help="Name, directory or hub id.")] = "tiny-wan",
    method: Annotated[
        list[str] | None, typer.Option(help="Preset to draw; repeatable. All by default.")
    ] = None,
    layer: Annotated[int, typer.Option(help="Of the self-attention; negative from the last.")] = -1,
    head: Annotated[int, typer.Option(help="Of the layer.")] = 0,
    step: Annotated[int, typer.Option(help="Denoising step, from 0.")] = 10,
    earlier: Annotated[
        int, typer.Option(help="Steps back to where flashblock computed what it keeps.")
    ] = 3,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the whole.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the clip.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Map what every method computes exactly, approximates and leaves out, in one head."""
    from dit_accel import presets
    from dit_accel.pipelines import media
    from dit_accel.pipelines.embedded import options_for

    if target.suffix.lower() != ".png":
        raise InputError(f"out: expected a name that ends in .png, got {target.name!r}")
    media.check_writable(target, force=force)
    if earlier < 1 or earlier > step:
        raise InputError(f"earlier: expected 1 to {step} steps, the step itself, got {earlier}")
    # those around another method come last
    rows = sorted(presets.catalogue(), key=lambda row: row.inherits is not None)
    names = method or [row.name for row in rows if row.paper is not None]
    methods = {name: presets.build(name, **options_for(model, name, {})) for name in names}
    quiet()
    import torch
    from PIL import Image

    from dit_accel.eval import calls, plan_figure
    from dit_accel.pipelines import load
    from dit_accel.pipelines.request import Request

    pipe = load(model, device=device_of(device))
    pipe.set_progress_bar_config(disable=True)
    request = Request(prompt, height=height, width=width, frames=frames, steps=steps, seed=seed)
    calls.check_place(pipe, request, layer, head, (step - earlier, step))
    with progress() as bar, torch.inference_mode():
        task = bar.add_task("denoising", total=step + 1)
        captured = calls.take(
            pipe,
            request,
            layer,
            head,
            (step - earlier, step),
            on_step=lambda done, total: bar.update(task, completed=done),
        )
        shown = plan_figure.panels(methods, captured)
        where = captured[step].ctx
        sheet = plan_figure.draw(
            plan_figure.attention_map(captured[step]),
            shown,
            f"{model}: layer {where.layer}, head {head}, step {step} of {where.num_steps}. Queries "
            "down, keys across, in the order of each method's layout",
        )
    flat = sheet.quantize(256, dither=Image.Dither.NONE)  # a third of the size
    media.replace_with(target, lambda part: flat.save(part, format="PNG", optimize=True))
    err.print(f"written  {target}", highlight=False, soft_wrap=True)
