"""What ``dit-accel generate`` measured: for the record, and for the eye."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from dit_accel.cli.common import out

if TYPE_CHECKING:
    from dit_accel.pipelines.generate import Generation


def times(result: Generation) -> dict[str, Any]:
    """Seconds of a generation, for its record."""
    return {
        "total": result.seconds,
        "step_median": median(result.step_seconds),
        "steps": result.step_seconds,
        "decode": result.decode_seconds,
    }


def measured(result: Generation, dense: Generation | None) -> dict[str, float] | None:
    """How near a method came to dense attention, and in what share of the time."""
    if dense is None:
        return None
    from dit_accel.eval.fidelity import psnr, ssim

    return {
        "psnr": psnr(result.frames, dense.frames),
        "ssim": ssim(result.frames, dense.frames),
        "step_time_ratio": median(result.step_seconds) / median(dense.step_seconds),
        "total_time_ratio": result.seconds / dense.seconds,
    }


def tell(record: dict[str, Any], result: Generation) -> None:
    """What a user wants to know of a record, on stdout."""
    from rich.table import Table

    from dit_accel.density import in_words

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    asked = record["density_asked"]
    *_, rows, columns = result.frames.shape
    shown = ", ".join(
        f"{name}={value}" for name, value in record["options"].items() if name != "density"
    )
    what, of = (
        ("image", "") if record["frames"] is None else ("clip", f"{record['frames']} frames of ")
    )
    guidance = "" if record["guidance"] is None else f"guidance {record['guidance']:g}, "
    told = {
        "method": record["method"] + (f" ({shown})" if shown else ""),
        "density": ("" if asked is None else f"{in_words(asked)} asked, ")
        + f"{result.density:.3f} measured",
        what: f"{of}{columns}x{rows}, {record['steps']} steps, {guidance}seed {record['seed']}",
        "time": f"{record['seconds']['step_median']:.2f} s per step, "
        f"{record['seconds']['total']:.1f} s in all, on {record['device']} in {record['dtype']}",
    }
    compared = record["compared"]
    if compared is not None:
        dense = record["dense_seconds"]["step_median"]
        told["to dense"] = (
            f"PSNR {compared['psnr']:.2f} dB, SSIM {compared['ssim']:.4f}, "
            f"{compared['step_time_ratio']:.2f}x its time per step ({dense:.2f} s)"
        )
        told["compare"] = record["compare_out"]
    told["file"] = record["out"]
    for name, text in told.items():
        table.add_row(name, text)
    out.print(table, highlight=False, soft_wrap=True)
