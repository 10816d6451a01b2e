"""What `bench_pipeline` found, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dit_accel.eval.pipeline_parts import PARTS
from dit_accel.eval.text_table import aligned

HEADINGS = (
    "model", "layers", "method", "steps", "density", "forward ms", "dense / it", "step ms",
    *(f"{part} ms" for part in PARTS), "remainder", "peak GiB",
)  # fmt: skip
NOTE = (
    "Weights are random: fidelity is not measured, attention is nearly uniform, and methods whose "
    "density depends on the data (psa, vmoba, top-p) are timed at the density that they measured. "
    "A forward is of one guidance branch; step ms are all forwards of a mean denoising step."
)


def table(found: Mapping[str, Any]) -> str:
    """The real numbers of layers: one line for every kind of step, and one for the mean step of a
    method with several. Runs that were only extrapolated from are left out."""
    lines = [HEADINGS]
    for name, model in found["models"].items():
        runs = []
        if "extrapolated" in model:
            runs.append(model["extrapolated"])
        if "whole" in model:
            runs.append(model["whole"])
        for run in runs:
            layers = "+".join(str(n) for n in run["layers"].values())
            if "from" in run:
                layers += f" (from {' and '.join(map(str, run['from']))})"
            for method, told in run["methods"].items():
                dense = run["methods"]["dense"]["mean_ms"]
                lines += [
                    (name, layers, method, *cells)
                    for cells in _lines(told, dense, found["num_steps"])
                ]
        for method, why in model["wrong"].items():
            lines.append((name, "", method, f"not timed: {why}", *[""] * (len(HEADINGS) - 4)))
    return aligned(lines, right=range(4, len(HEADINGS)))


def _lines(told: Mapping[str, Any], dense: float, steps: int) -> Iterator[tuple[str, ...]]:
    kinds = told["kinds"]
    peak = told.get("peak_bytes")
    memory = "" if peak is None else f"{peak / 2**30:.1f}"
    only = len(kinds) == 1
    for kind, one in kinds.items():
        parts = one.get("parts")
        yield (
            f"{kind} ({one['count']} of {steps})",
            f"{one['density']:.3f}",
            f"{one['ms']:.2f}",
            f"{one['ratio']:.2f}",
            f"{told['step_ms']:.1f}" if only else "",
            *("" if parts is None else f"{parts[part]:.2f}" for part in PARTS),
            "" if parts is None else f"{one['remainder_ms']:.2f}",
            memory if only else "",
        )
    if not only:
        mean = told["mean_ms"]
        yield (
            f"mean of {steps}", "", f"{mean:.2f}", f"{dense / mean:.2f}", f"{told['step_ms']:.1f}",
            *[""] * len(PARTS), "", memory,
        )  # fmt: skip
