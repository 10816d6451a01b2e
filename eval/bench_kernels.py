"""Single operations, and whole calls of methods, on a GPU: milliseconds, TFLOP/s, GB/s and memory.

    dit-accel bench kernels --ops dense,methods,error_probe --shapes wan14b --out run.json

(``python -m dit_accel.eval.bench_kernels`` is the same, and needs neither diffusers nor rich.)

Every operation is checked first, in the dtype that is timed, and one that is wrong is not timed.
TFLOP/s and GB/s count what the operation cannot do without (`kernel_cases.Case`), and stand beside
those of a matrix product and of a copy in the same run. Times are medians over calls with a cold
L2 cache: ``ms`` as called from Python, and ``device`` the same work replayed from a CUDA graph,
which is what is left where the host runs ahead, as it does in a large model.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dit_accel.eval.attention_cases import ATTENTION_CASES, ATTENTION_CHECKS
from dit_accel.eval.kernel_cases import CASES, SHAPES, STRENGTHS, Case, Shape, inputs
from dit_accel.eval.kernel_checks import CHECKS
from dit_accel.eval.memory_cases import MEMORY_CASES, MEMORY_CHECKS
from dit_accel.eval.method_cases import (
    check_head_groups,
    check_methods,
    head_group_cases,
    method_cases,
)
from dit_accel.eval.peak_memory import cuda_peak
from dit_accel.eval.records import dumps, signed
from dit_accel.eval.text_table import aligned

ALL_CASES = {
    **CASES,
    **ATTENTION_CASES,
    **MEMORY_CASES,
    "methods": method_cases,
    "head_groups": head_group_cases,
}
ALL_CHECKS = {
    **CHECKS,
    **ATTENTION_CHECKS,
    **MEMORY_CHECKS,
    "methods": check_methods,
    "head_groups": check_head_groups,
}
"""Operations, and whole calls of methods."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def milliseconds(call: Callable[[], Any], device: str, budget_ms: float) -> float:
    """Median time of a call, over about so many milliseconds of calls."""
    if device == "cpu":
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return median(times)
    from triton.testing import do_bench

    return float(do_bench(call, warmup=budget_ms / 4, rep=budget_ms, return_mode="median"))


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The work of a call as a CUDA graph, to be replayed with the inputs where they are.

    Raises:
        RuntimeError: it does what no graph can hold, such as waiting for the device.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay


def launches(call: Callable[[], Any]) -> int:
    """How many kernels, copies and fills a call has the device run."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as told:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in told.key_averages() if event.self_device_time_total > 0)


def waits(call: Callable[[], Any]) -> str | None:
    """Where a call makes the host wait for the device, in one line; ``None`` if nowhere."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "dit_accel" in frame.filename] or frames
        return f"{Path(ours[-1].filename).parent.name}/{Path(ours[-1].filename).name}:" + str(
            ours[-1].lineno
        )
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


def ceilings(budget_ms: float) -> dict[str, float]:
    """A matrix product's TFLOP/s in bf16, and a copy's GB/s, read and write together."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").to(torch.bfloat16)
    product = milliseconds(lambda: a @ b, "cuda", budget_ms)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), "cuda", budget_ms)
    return {"matmul_tflops": 2 * 8192**3 / product / 1e9, "copy_gbs": 2 * 2**30 / copy / 1e6}


def measure(case: Case, device: str, budget_ms: float) -> dict[str, Any]:
    """One row."""
    case.call()  # compiled, and its buffers known to the allocator
    stops = None if device == "cpu" else waits(case.call)
    took = milliseconds(case.call, device, budget_ms)
    alone = runs = None
    note = case.note
    if device != "cpu":
        runs = launches(case.call)
        try:
            alone = milliseconds(captured(case.call), device, budget_ms)
        except RuntimeError as error:
            torch.cuda.synchronize()
            reason = str(error).splitlines()[0]
            note = "; ".join(filter(None, (note, f"no graph: {reason}")))
    return {
        "case": case.name,
        "ms": took,
        "device_ms": alone,
        "launches": runs,
        "tflops": case.flops / took / 1e9,
        "gbs": case.bytes / took / 1e6,
        "peak_mib": None if device == "cpu" else cuda_peak(case.call) / 2**20,
        "waits": stops,
        "note": note,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text, columns aligned."""
    numbers = ("ms", "dense / ms", "device", "dense / device", "launches", "TFLOP/s", "GB/s", "MiB")
    head = ("operation", "shape", "case", *numbers, "host waits", "note")
    lines = [head]
    for row in rows:
        if "error" in row:
            lines.append((row["op"], row["shape"], row.get("case", ""), *[""] * 9, row["error"]))
            continue

        def shown(name: str, form: str, row: dict[str, Any] = row) -> str:
            return "" if row.get(name) is None else format(row[name], form)

        lines.append(
            (
                row["op"],
                row["shape"],
                row["case"],
                shown("ms", ".3f"),
                shown("speedup", ".2f"),
                shown("device_ms", ".3f"),
                shown("device_speedup", ".2f"),
                shown("launches", "d"),
                shown("tflops", ".0f"),
                shown("gbs", ".0f"),
                shown("peak_mib", ".0f"),
                row["waits"] or "no",
                row["note"],
            )
        )
    return aligned(lines, right=range(3, 11))


def run(
    operations: Sequence[str],
    shapes: Sequence[str],
    *,
    dtype: str = "bfloat16",
    device: str = "cuda",
    strength: str = "sharp",
    budget_ms: float = 200.0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Check and time; what fails is a row that says so.

    Args:
        operations: names of `CASES`.
        shapes: names of `SHAPES`.
        dtype: one of `DTYPES`.
        device: ``"cuda"``, or ``"cpu"`` for what runs there.
        strength: of the inputs' attention, one of `STRENGTHS`.
        budget_ms: of calls, for each row.
        say: told every row when it is there.
    """
    found: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "strength": strength,
        "rows": [],
    }
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["ceilings"] = ceilings(budget_ms)
        say(", ".join(f"{name} {value:.0f}" for name, value in found["ceilings"].items()))
    wrong: dict[tuple[str, int], str] = {}
    for op in operations:
        for depth in {SHAPES[name].head_dim for name in shapes}:
            if op not in ALL_CHECKS:
                continue
            try:
                ALL_CHECKS[op](DTYPES[dtype], depth, device)
                say(f"{op}, D={depth}: correct")
            except Exception as error:  # whatever it is, the other operations go on
                wrong[op, depth] = f"not timed: {type(error).__name__}: {error}"
                say(f"{op}, D={depth}: {wrong[op, depth]}\n{traceback.format_exc()}")
    for name in shapes:
        shape: Shape = SHAPES[name]
        parts = inputs(shape, DTYPES[dtype], device, strength=strength)
        for op in operations:
            where = {"op": op, "shape": name}
            if (op, shape.head_dim) in wrong:
                found["rows"].append(where | {"error": wrong[op, shape.head_dim]})
                continue
            try:
                for case in ALL_CASES[op](shape, parts):
                    row = where | {"case": case.name}
                    try:
                        row |= measure(case, device, budget_ms)
                    except Exception as error:
                        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                    found["rows"].append(row)
                    say(table([row]).splitlines()[1])
            except Exception as error:
                found["rows"].append(where | {"error": f"{type(error).__name__}: {error}"})
                say(traceback.format_exc())
            if device == "cuda":
                torch.cuda.empty_cache()
        _compare([row for row in found["rows"] if row["shape"] == name])
    return found


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Set beside every method how many times faster it is than the fastest dense of the shape."""
    for name, ratio in (("ms", "speedup"), ("device_ms", "device_speedup")):
        dense = [row[name] for row in rows if row["op"] == "dense" and row.get(name)]
        for row in rows:
            if dense and row["op"] == "methods" and row.get(name):
                row[ratio] = min(dense) / row[name]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", default=",".join(ALL_CHECKS), help=f"of {', '.join(ALL_CASES)}")
    parser.add_argument("--shapes", default="wan14b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--inputs", default="sharp", choices=STRENGTHS, help="how concentrated attention is"
    )
    parser.add_argument("--budget-ms", type=float, default=200.0, help="of calls, for each row")
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    given = parser.parse_args(words)
    for name, known, some in (("ops", ALL_CASES, given.ops), ("shapes", SHAPES, given.shapes)):
        for word in some.split(","):
            if word not in known:
                parser.error(f"--{name}: expected some of {', '.join(known)}, got {word!r}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected one that is here, got 'cuda' without CUDA")
    with torch.inference_mode():
        found = run(
            given.ops.split(","),
            given.shapes.split(","),
            dtype=given.dtype,
            device=given.device,
            strength=given.inputs,
            budget_ms=given.budget_ms,
            say=lambda text: print(text, flush=True),
        )
    print(table(found["rows"]))
    if given.out is not None:
        command = ["python", "-m", "dit_accel.eval.bench_kernels", *(words or sys.argv[1:])]
        given.out.write_text(dumps(signed({"command": command, **found})))
    return 1 if any("error" in row for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
