"""``dit-accel generate``: from a prompt to a clip."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cli.common import (
    device_of,
    dtype_of,
    err,
    method_options,
    out,
    progress,
    quiet,
)

if TYPE_CHECKING:
    from dit_accel.pipelines.generate import Generation, Request


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
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.")] = None,
    target: Annotated[
        Path, typer.Option("--out", help="clip.mp4, clip.gif, or a folder for png.")
    ] = Path("clip.mp4"),
    compare: Annotated[
        bool, typer.Option("--compare", help="Also generate densely, and compare.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    configured: Mapping[str, Any] | None = None,
) -> None:
    """Generate a clip, and say what it took.

    Beside the clip a JSON file tells every setting, the versions and what was measured. With
    --compare a second file shows dense on the left and the method on the right.
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
    media.kind_of(target)
    record_path = target.with_suffix(".json")
    both_path = target.with_name(f"{target.stem}-compare{target.suffix}")
    for path in (target, record_path, *((both_path,) if compare else ())):
        media.check_writable(path, force=force)

    quiet()
    from dit_accel.pipelines import accelerate, embedded, load
    from dit_accel.pipelines.generate import Request, effective

    start = time.perf_counter()
    with err.status(f"loading {model}"):
        pipe = load(model, dtype=chosen_dtype, device=device_of(device))
        pipe.set_progress_bar_config(disable=True)
    load_seconds = time.perf_counter() - start
    inside = embedded.find(model)
    rate = fps or (inside.fps if inside else 16)
    asked = Request(prompt, negative_prompt, height, width, frames, steps, guidance, seed)
    request = effective(pipe, asked)

    accelerate(pipe, method, **options)
    made = _method_of(pipe)
    dense: Generation | None = None
    with progress() as bars:
        if compare:
            accelerate(pipe, "dense")
            dense = _run(pipe, request, bars, "dense")
            accelerate(pipe, method, **options)
        result = _run(pipe, request, bars, method)
    media.write_clip(result.frames, target, rate)
    measured = _measured(result, dense)
    if dense is not None:
        import torch

        gap = torch.ones(*result.frames.shape[:3], 4)
        both = torch.cat([dense.frames, gap, result.frames], dim=3)
        media.write_clip(both, both_path, rate)

    from dit_accel.eval import records
    from dit_accel.options import plain

    record = {
        "model": model,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "method": method,
        "options": made.to_config()["options"],
        "seed": seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "height": request.height,
        "width": request.width,
        "frames": request.frames,
        "fps": rate,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "density_asked": plain(made.density_asked),
        "density": result.density,
        "density_by_step": result.by_step,
        "density_by_layer": result.by_layer,
        "seconds": {"load": load_seconds, **_times(result)},
        "dense_seconds": None if dense is None else _times(dense),
        "compared": measured,
        "out": str(target),
        "compare_out": str(both_path) if compare else None,
    }
    media.write_text(record_path, records.dumps(records.signed(record)))
    _tell(record, result)


def _method_of(pipe: Any) -> Any:
    from dit_accel.pipelines.families import family_of, models_of

    model = next(iter(models_of(pipe).values()))
    family = family_of(model)
    assert family is not None
    return family.self_attention(model)[0].processor.method


def _run(pipe: Any, request: Request, bars: Any, name: str) -> Generation:
    from dit_accel.pipelines.generate import generate as run

    task = bars.add_task(name, total=request.steps)
    return run(pipe, request, lambda done, total: bars.update(task, completed=done))


def _times(result: Generation) -> dict[str, Any]:
    return {
        "total": result.seconds,
        "step_median": median(result.step_seconds),
        "steps": result.step_seconds,
        "decode": result.decode_seconds,
    }


def _measured(result: Generation, dense: Generation | None) -> dict[str, float] | None:
    if dense is None:
        return None
    from dit_accel.eval.metrics.fidelity import psnr, ssim

    return {
        "psnr": psnr(result.frames, dense.frames),
        "ssim": ssim(result.frames, dense.frames),
        "step_time_ratio": median(result.step_seconds) / median(dense.step_seconds),
        "total_time_ratio": result.seconds / dense.seconds,
    }


def _tell(record: dict[str, Any], result: Generation) -> None:
    from rich.table import Table

    from dit_accel.density import in_words

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    asked = record["density_asked"]
    shown = ", ".join(
        f"{name}={value}" for name, value in record["options"].items() if name != "density"
    )
    rows = {
        "method": record["method"] + (f" ({shown})" if shown else ""),
        "density": ("" if asked is None else f"{in_words(asked)} asked, ")
        + f"{result.density:.3f} measured",
        "clip": f"{record['frames']} frames of {record['width']}x{record['height']}, "
        f"{record['steps']} steps, guidance {record['guidance']:g}, seed {record['seed']}",
        "time": f"{record['seconds']['step_median']:.2f} s per step, "
        f"{record['seconds']['total']:.1f} s in all, on {record['device']} in {record['dtype']}",
    }
    compared = record["compared"]
    if compared is not None:
        dense = record["dense_seconds"]["step_median"]
        rows["to dense"] = (
            f"PSNR {compared['psnr']:.2f} dB, SSIM {compared['ssim']:.4f}, "
            f"{compared['step_time_ratio']:.2f}x its time per step ({dense:.2f} s)"
        )
        rows["compare"] = record["compare_out"]
    rows["file"] = record["out"]
    for name, text in rows.items():
        table.add_row(name, text)
    out.print(table, highlight=False, soft_wrap=True)
