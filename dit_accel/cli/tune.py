"""``dit-accel tune-kernels``: settings of kernels, measured on this device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.common import dtype_of, err, out


def tune_kernels(
    ops: Annotated[
        str, typer.Option(help="Kernels, with commas, as docs/kernels.md lists them; or all.")
    ] = "all",
    shapes: Annotated[
        str, typer.Option(help="Of wan14b, wan1.3b, hunyuan, flux, with commas.")
    ] = "wan1.3b,wan14b",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    budget_ms: Annotated[float, typer.Option(help="Of calls, for each candidate.")] = 20.0,
    target: Annotated[
        Path | None, typer.Option("--out", help="File to write; by default the user's own.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing.")] = False,
) -> None:
    """Find the fastest tiles, warps and stages of kernels on this GPU, and keep them.

    A candidate is taken if it is right and at least 2% faster than what is in use. Kept are the
    shapes that were measured; all others stay as they are.
    """
    import torch

    from dit_accel.errors import InputError
    from dit_accel.eval import bench_kernels, tuning
    from dit_accel.eval.kernel_cases import SHAPES
    from dit_accel.eval.text_table import aligned
    from dit_accel.kernels.tuning import files, lookup

    chosen = list(tuning.PROBLEMS) if ops == "all" else ops.split(",")
    names = shapes.split(",")
    for name, known, given in (("ops", tuning.PROBLEMS, chosen), ("shapes", SHAPES, names)):
        for word in given:
            if word not in known:
                raise InputError(f"{name}: expected some of {', '.join(known)}, got {word!r}")
    made = dtype_of(dtype)
    if not torch.cuda.is_available():
        raise InputError("tune-kernels: expected a CUDA device, got none")
    architecture = lookup.architecture_of(torch.device("cuda"))
    where = target or files.own(architecture)
    try:
        if where.exists():
            files.read(where, architecture)  # before anything is measured
        found = []
        with torch.inference_mode():
            for op, name, one in tuning.run(
                chosen,
                names,
                dtype=made,
                device="cuda",
                timer=lambda call: bench_kernels.milliseconds(call, "cuda", budget_ms),
            ):
                if one is None:
                    text = f"{op}, {name}: this device's kernel has no settings in {made}"
                else:
                    text = tuning.told(one)
                    found.append(one)
                    if not dry_run:  # a run that is stopped keeps what it has
                        tuning.keep(found, architecture, torch.cuda.get_device_name(), where)
                err.print(text, highlight=False, markup=False, soft_wrap=True)
    except ValueError as error:
        raise InputError(str(error)) from None
    table = aligned(tuning.rows(found), right=range(3, 6))
    out.print(table, highlight=False, markup=False, soft_wrap=True)
    if found and not dry_run:
        err.print(f"written  {where}", highlight=False, soft_wrap=True)
