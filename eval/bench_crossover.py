"""From what length on each method is faster than dense attention, on the GPU at hand.

    dit-accel bench crossover --out crossovers.json

(``python -m dit_accel.eval.bench_crossover`` is the same, and needs neither diffusers nor rich.)

Times are those of calls from Python, one after the other without waiting in between, medians of
three runs: on short sequences the host's time for launching is what counts. The file is what
`dit_accel.crossover` reads; with ``--into FILE`` the figures of other architectures in it are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import crossover, presets
from dit_accel.eval.kernel_cases import Shape, inputs
from dit_accel.eval.records import signed
from dit_accel.kernels.atomic import write_text
from dit_accel.method import Method
from dit_accel.state import State
from dit_accel.types import Context, Geometry

GRIDS: Final = ((1, 32, 32), (2, 32, 32), (4, 32, 32), (8, 32, 32), (4, 64, 64), (21, 30, 52))
"""Video grids of 1,024 tokens up to 32,760, which is Wan 1.3B at 480p."""
HEADS: Final = (12, 24, 40)
HEAD_DIM: Final = 128
SETTINGS: Final[dict[str, tuple[tuple[str, Mapping[str, Any]], ...]]] = {
    "pisa": tuple(
        ("pisa", {"density": density, "rest": rest})
        for rest in ("taylor", "moment")
        for density in (0.1, 0.2, 0.4)
    ),
    "psa": (("psa", {}),),
    "svg_ear": tuple(("svg_ear", {"density": density}) for density in (0.22, 0.4)),
    "vmoba": (("vmoba", {"threshold": 0.25}),),
    "flashblock": tuple(
        ("flashblock", {"inner": "pisa", "density": density}) for density in (0.1, 0.2, 0.4)
    ),
}
"""What is measured, by method."""


def took(call: Callable[[int], Any], device: str, calls: int, budget_ms: float) -> float:
    """Median milliseconds of a call, called with 1, 2, … , some at a time without waiting.

    Args:
        call: what is timed; a whole number of ``calls`` belong together, such as a cycle of steps.
        device: ``"cuda"``, or ``"cpu"`` for tests.
        calls: how many belong together.
        budget_ms: for all of them.
    """
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    number, found = 0, []

    def run(times: int) -> float:
        nonlocal number
        wait()
        start = time.perf_counter()
        for _ in range(times):
            number += 1
            call(number)
        wait()
        return (time.perf_counter() - start) * 1e3 / times

    run(calls)
    once = run(calls)
    times = max(1, round(budget_ms / 3 / max(once, 1e-3) / calls)) * calls
    for _ in range(3):
        found.append(run(times))
    return median(found)


def dense_times(q: Tensor, k: Tensor, v: Tensor, device: str, budget_ms: float) -> dict[str, float]:
    """``sdpa``, torch's own choice, and ``best``, the fastest of that and cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def plain(_: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def cudnn(_: int) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    found = {"sdpa": took(plain, device, 1, budget_ms)}
    others = [took(cudnn, device, 1, budget_ms)] if device == "cuda" else []
    return (
        found | {"best": min(found["sdpa"], *others)} if others else found | {"best": found["sdpa"]}
    )


def method_time(
    method: Method,
    layer: int,
    parts: tuple[Tensor, ...],
    grid: tuple[int, int, int],
    device: str,
    budget_ms: float,
) -> float:
    """Milliseconds of a call after the first step, the mean over what recurs."""
    q, k, v = parts
    state = State()

    def call(step: int) -> None:
        where = Context(Geometry(grid), step=step, num_steps=10**6, layer=layer, state=state)
        method(q, k, v, where)

    call(0)
    cycle = int(method.options.get("refresh", 1))
    return took(call, device, cycle, budget_ms)


def sweep(
    names: Sequence[str],
    heads: Sequence[int] = HEADS,
    grids: Sequence[tuple[int, int, int]] = GRIDS,
    *,
    head_dim: int = HEAD_DIM,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    budget_ms: float = 30.0,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Times of methods and of dense attention by length.

    Returns:
        For every setting, layer and number of heads ``method``, ``options``, ``share``, ``layer``,
        ``heads``, ``head_dim`` and ``times``: ``[tokens, ms, ms of sdpa, ms of the best]``.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for count in heads:
        for grid in grids:
            shape = Shape(grid, count, 0, head_dim)
            parts = inputs(shape, dtype, device)
            dense = dense_times(*parts, device, budget_ms)
            for name, layer, method in _settings(names):
                key = (name, str(method.options), layer, count)
                if key not in rows:
                    rows[key] = _row(method, layer, count, head_dim)
                ms = method_time(method, layer or 0, parts, grid, device, budget_ms)
                rows[key]["times"].append([shape.tokens, ms, dense["sdpa"], dense["best"]])
                share = rows[key]["share"]
                say(
                    f"{name:11} share {share} layer {layer} heads {count:3} tokens "
                    f"{shape.tokens:6}: {ms:8.3f} ms, dense {dense['sdpa']:8.3f} best "
                    f"{dense['best']:8.3f}, {dense['best'] / ms:5.2f}"
                )
    return list(rows.values())


def _settings(names: Sequence[str]) -> Iterator[tuple[str, int | None, Method]]:
    for group in names:
        for name, options in SETTINGS[group]:
            method = presets.build(name, **options)
            period = method.period
            for layer in (None,) if period is None else range(period):
                yield name, layer, method


def _row(method: Method, layer: int | None, heads: int, head_dim: int) -> dict[str, Any]:
    budget = method.budget
    return {
        "method": method.name,
        "options": crossover.options_of(method),
        "share": None if budget is None else budget[1],
        "layer": layer,
        "heads": heads,
        "head_dim": head_dim,
        "times": [],
    }


def crossovers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `dit_accel.crossover` reads: the shortest length from which on a method is faster."""
    found = []
    for row in rows:
        for at, against in ((2, "sdpa"), (3, "best")):
            tokens = None
            for time_of in sorted(row["times"], reverse=True):
                if time_of[1] >= time_of[at]:
                    break
                tokens = time_of[0]
            kept = {name: value for name, value in row.items() if name != "times"}
            longest = max(time_of[0] for time_of in row["times"])
            found.append(kept | {"against": against, "tokens": tokens, "longest": longest})
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default=",".join(SETTINGS), help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--heads", default=",".join(map(str, HEADS)))
    parser.add_argument("--budget-ms", type=float, default=30.0, help="of calls, for each figure")
    parser.add_argument("--into", type=Path, help="a file of figures to put these into")
    given = parser.parse_args(words)
    names = given.methods.split(",")
    for name in names:
        if name not in SETTINGS:
            parser.error(f"--methods: expected some of {', '.join(SETTINGS)}, got {name!r}")
    if not torch.cuda.is_available():
        parser.error("expected a GPU, which is what is measured, got none")
    for heads in (int(word) for word in given.heads.split(",")):
        made = measure(names, [heads], given.budget_ms, lambda text: print(text, flush=True))
        print("\n".join(lines(made)), flush=True)
        if given.into is not None:
            write(made, given.into)
    return 0


def measure(
    names: Sequence[str], heads: Sequence[int], budget_ms: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """The figures of the GPU at hand, under its architecture."""
    architecture = crossover.architecture_of(torch.device("cuda", torch.cuda.current_device()))
    assert architecture is not None
    with torch.inference_mode():
        rows = sweep(names, heads, budget_ms=budget_ms, say=say)
    about = signed({"device": torch.cuda.get_device_name(), "methods": list(names)})
    return {architecture: {"measured": about, "rows": crossovers(rows)}}


def lines(made: Mapping[str, Any]) -> Iterator[str]:
    """The figures in words, one setting a line."""
    for architecture, figures in made.items():
        for row in figures["rows"]:
            share = "" if row["share"] is None else f", share {row['share']:g}"
            layer = "" if row["layer"] is None else f", layer {row['layer']}"
            rest = row["options"].get("rest")
            tokens = row["tokens"]
            found = f"not up to {row['longest']:,}" if tokens is None else f"from {tokens:,}"
            yield (
                f"sm_{architecture.replace('.', '')} {row['method']}, rest {rest}{share}{layer}, "
                f"{row['heads']} heads: faster than {row['against']} {found} tokens"
            )


def write(made: Mapping[str, Any], path: Path) -> None:
    """Put figures into a file, in place of those of the same architecture, methods and heads.

    How they were measured is put behind how those were that stay.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    for architecture, new in made.items():
        old = known.get(architecture, {"rows": []})
        ours = {(row["method"], row["heads"]) for row in new["rows"]}
        rows = [row for row in old["rows"] if (row["method"], row["heads"]) not in ours]
        stay = {row["method"] for row in rows}
        about = [one for one in old.get("measured", ()) if stay & set(one.get("methods", ()))]
        latest = json.loads(json.dumps(new["measured"]))
        about = [one for one in about if one != latest] + [latest]
        known[architecture] = {"measured": about, "rows": rows + new["rows"]}
    lines = []
    for architecture, figures in known.items():
        each = ",\n   ".join(json.dumps(row) for row in figures["rows"])
        records = ",\n   ".join(json.dumps(one) for one in figures["measured"])
        told = f'"measured": [\n   {records}\n  ],\n  "rows": [\n   {each}\n  ]'
        lines.append(f' "{architecture}": {{\n  {told}\n }}')
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
