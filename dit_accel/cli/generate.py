"""``dit-accel generate``: from a prompt to a clip or an image."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cli.common import (
    device_of,
    dtype_of,
    err,
    method_options,
    progress,
    quiet,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dit_accel.pipelines.generate import Generation
    from dit_accel.pipelines.request import Kind, Request


def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    model: Annotated[
        str, typer.Option(help="An embedded model, a directory, or a hub id.")
    ] = "tiny-wan",
    method: Annotated[str, typer.Option(help="See dit-accel methods.")] = "pisa",
    density: Annotated[
        str | None,
        typer.Option(
            help="Share of block pairs computed exactly, in (0, 1]; 0.3,0.2 by layer, "
            "0:1.0,0.2:0.15 by step."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any option of the method; repeatable."),
    ] = None,
    dense_steps: Annotated[
        str | None, typer.Option(help="First steps that stay dense: a count, or a fraction.")
    ] = None,
    dense_layers: Annotated[
        str | None, typer.Option(help="Layers that stay dense, such as 0,-1.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of guidance; 1 is none.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the clip.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="To start from, or to edit, where the model does that.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.")] = None,
    norm_rotary: Annotated[
        str,
        typer.Option(
            help="Who computes norms and rotary embedding of queries and keys: auto, triton or "
            "diffusers."
        ),
    ] = "auto",
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="clip.mp4, clip.gif, or a folder for png; image.png for a model of images.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also generate densely, and compare.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    configured: Mapping[str, Any] | None = None,
) -> None:
    """Generate a clip or an image, and say what it took.

    Beside it a JSON file tells every setting, the versions and what was measured. With --compare a
    second file shows dense on the left and the method on the right.
    """
    from dit_accel import presets
    from dit_accel.errors import InputError
    from dit_accel.pipelines import media

    # whatever can be refused is refused before anything is loaded
    options = method_options(method, density, settings or (), dense_steps, dense_layers, configured)
    presets.build(method, **options)
    chosen_dtype = dtype_of(dtype)
    if fps is not None and not 1 <= fps <= 240:
        raise InputError(f"fps: expected an integer from 1 to 240, got {fps}")
    quiet()
    from dit_accel.pipelines.loading import pipeline_class
    from dit_accel.pipelines.norms import check_choice
    from dit_accel.pipelines.request import Request, check, effective, kind_named

    check_choice(norm_rotary)
    kind = kind_named(pipeline_class(model))
    picture = None if image is None else media.read_image(image)
    asked = Request(prompt, negative_prompt, height, width, frames, steps, guidance, seed, picture)
    check(kind, asked)
    target = _target(kind, target, fps)
    record_path = target.with_suffix(".json")
    both_path = target.with_name(f"{target.stem}-compare{target.suffix}")
    for path in (target, record_path, *((both_path,) if compare else ())):
        media.check_writable(path, force=force)

    from dit_accel.pipelines import accelerate, embedded, load

    start = time.perf_counter()
    with err.status(f"loading {model}"):
        pipe = load(model, dtype=chosen_dtype, device=device_of(device))
        pipe.set_progress_bar_config(disable=True)
    load_seconds = time.perf_counter() - start
    inside = embedded.find(model)
    rate = fps or (inside.fps if inside else 16)
    request = effective(pipe, asked)

    accelerate(pipe, method, norm_rotary=norm_rotary, **options)
    made = _method_of(pipe)
    dense: Generation | None = None
    with progress() as bars:
        if compare:
            accelerate(pipe, "dense")
            dense = _run(pipe, request, bars, "dense")
            accelerate(pipe, method, norm_rotary=norm_rotary, **options)
        result = _run(pipe, request, bars, method)
    _write(kind, result.frames, target, rate)
    if dense is not None:
        import torch

        gap = torch.ones(*result.frames.shape[:3], 4)
        both = torch.cat([dense.frames, gap, result.frames], dim=3)
        _write(kind, both, both_path, rate)

    from dit_accel.cli.report import measured, tell, times
    from dit_accel.eval import records
    from dit_accel.options import plain

    count, _, rows, columns = result.frames.shape
    record = {
        "model": model,
        "pipeline": type(pipe).__name__,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "image": None if image is None else str(image),
        "method": method,
        "options": made.to_config()["options"],
        "seed": seed,
        "steps": request.steps,
        "guidance": request.guidance,
        # none where it cannot be asked for: a record is enough to repeat a run
        "height": rows if "height" in kind.arguments else None,
        "width": columns if "width" in kind.arguments else None,
        "frames": count if kind.video else None,
        "fps": rate if kind.video else None,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "density_asked": plain(made.density_asked),
        "density": result.density,
        "density_by_step": result.by_step,
        "density_by_layer": result.by_layer,
        "norm_rotary": norm_rotary,
        "norm_rotary_calls": result.norm_rotary,
        "seconds": {"load": load_seconds, **times(result)},
        "dense_seconds": None if dense is None else times(dense),
        "compared": measured(result, dense),
        "out": str(target),
        "compare_out": str(both_path) if compare else None,
    }
    media.write_text(record_path, records.dumps(records.signed(record)))
    tell(record, result)


def _target(kind: Kind, target: Path | None, fps: int | None) -> Path:
    """Where the result goes, by a name that fits it."""
    from dit_accel.errors import InputError
    from dit_accel.pipelines import media

    if kind.video:
        target = target or Path("clip.mp4")
        media.kind_of(target)
        return target
    if fps is not None:
        raise InputError(
            f"fps: expected none for a {kind.name}, since it makes one image, got {fps}"
        )
    target = target or Path("image.png")
    media.check_image_name(target)
    return target


def _write(kind: Kind, frames: Tensor, target: Path, rate: int) -> None:
    from dit_accel.pipelines import media

    if kind.video:
        media.write_clip(frames, target, rate)
    else:
        media.write_image(frames, target)


def _method_of(pipe: Any) -> Any:
    from dit_accel.pipelines.families import family_of, models_of

    model = next(iter(models_of(pipe).values()))
    family = family_of(model)
    assert family is not None
    return family.self_attention(model)[0].processor.method


def _run(pipe: Any, request: Request, bars: Any, name: str) -> Generation:
    from dit_accel.pipelines.generate import generate as run

    task = bars.add_task(name, total=request.steps)
    return run(pipe, request, lambda done, total: bars.update(task, completed=done, total=total))
