"""What the first call of a method takes, where its kernels have to be compiled, and where they lie
in Triton's cache on disk.

    dit-accel bench first-use --out run.json

(``python -m dit_accel.eval.bench_first_use`` is the same, and needs neither diffusers nor rich.)

Every method runs in two processes of its own, the second with the cache that the first one left.
Imports and the first use of the device, by torch's own dense attention on the same inputs, are told
apart. A first use is one call of every layer that the method treats differently, in its first step
and in the one after: all kinds of kernels that a generation begins with.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

METHODS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "pisa": ("pisa", {"density": 0.15}),
    "pisa_moment": ("pisa", {"density": 0.15, "rest": "moment"}),
    "svg_ear": ("svg_ear", {"density": 0.22}),
    "psa": ("psa", {}),
    "vmoba": ("vmoba", {"threshold": 0.25}),
    "flashblock": ("flashblock", {"inner": "pisa", "density": 0.15}),
}
"""Presets and options that are measured, by name."""
_MODULE: Final = "dit_accel.eval.bench_first_use"
_STEPS: Final = 2
_LONGEST: Final = 300
"""Seconds that a process may take."""


def first_use(name: str, shape: str, device: str, begin: float) -> dict[str, Any]:
    """The first use of a method in this process, which must not have used it before.

    Args:
        name: of `METHODS`.
        shape: of `dit_accel.eval.kernel_cases.SHAPES`.
        device: ``"cuda"``, or ``"cpu"`` for tests.
        begin: when the process was started, in seconds since the epoch.

    Returns:
        Seconds: of ``imports``, of the device's ``start``, of the ``first`` use, and of the same
        calls ``again``; ``calls`` of the first use by step and layer; and ``kernels``, how many
        were ``compiled`` in how many seconds in all, and the ``slowest`` one.
    """
    import torch

    from dit_accel import presets
    from dit_accel.eval.kernel_cases import SHAPES, inputs
    from dit_accel.state import State
    from dit_accel.types import Context

    preset, options = METHODS[name]
    method = presets.build(preset, **options)
    layers = range(method.period or 1)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    imported, began = time.time() - begin, time.perf_counter()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    where = SHAPES[shape]
    q, k, v = inputs(where, dtype, device)
    torch.nn.functional.scaled_dot_product_attention(q, k, v)
    wait()
    started = time.perf_counter() - began

    def use() -> list[tuple[int, int, float]]:
        state, calls = State(), []
        for step in range(_STEPS):
            for layer in layers:
                ctx = Context(
                    where.context.geometry,
                    step=step,
                    num_steps=50,
                    layer=layer,
                    num_layers=len(layers),
                    state=state,
                )
                before = time.perf_counter()
                method(q, k, v, ctx)
                wait()
                calls.append((step, layer, time.perf_counter() - before))
        return calls

    compiled = watched()
    with torch.inference_mode():
        calls, again = use(), use()
    slowest = max(compiled, key=lambda one: one[1], default=None)
    return {
        "imports": imported,
        "start": started,
        "first": sum(took for *_, took in calls),
        "again": sum(took for *_, took in again),
        "calls": [{"step": step, "layer": layer, "seconds": took} for step, layer, took in calls],
        "kernels": {
            "compiled": len(compiled),
            "seconds": sum(took for _, took in compiled),
            "slowest": slowest,
        },
    }


def watched() -> list[tuple[str, float]]:
    """A list that grows with every kernel that Triton compiles from now on: name and seconds.

    What comes from its cache on disk does not count. It stays empty without Triton.
    """
    found: list[tuple[str, float]] = []
    try:
        from triton import knobs
    except ImportError:
        return found

    def listener(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            found.append((src.fn.fn.__name__, times.total / 1e6))

    knobs.compilation.listener = listener
    return found


def in_a_process(name: str, shape: str, device: str, cache: str) -> dict[str, Any]:
    """`first_use` in a new process, with a folder for Triton's cache; ``error`` if it failed."""
    from dit_accel.eval.peak_memory import in_new_process

    given = (name, shape, device, time.time())
    try:
        found: dict[str, Any] = in_new_process(
            _MODULE,
            "first_use",
            *given,
            environment={"TRITON_CACHE_DIR": cache},
            seconds=_LONGEST,
        )
    except RuntimeError as error:
        return {"error": str(error).strip().splitlines()[-1]}
    return found


def run(
    names: Sequence[str],
    *,
    shape: str = "wan1.3b",
    device: str = "cuda",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every method in turn, alone on the machine: ``cold``, then from ``disk``.

    Args:
        names: of `METHODS`.
        shape: of `dit_accel.eval.kernel_cases.SHAPES`.
        device: ``"cuda"``, or ``"cpu"`` for tests.
        say: told every row when it is there.
    """
    rows = []
    for name in names:
        row: dict[str, Any] = {"method": name}
        with tempfile.TemporaryDirectory(prefix="dit_accel_first_use_") as cache:
            for kind in ("cold", "disk"):
                row[kind] = in_a_process(name, shape, device, cache)
                if "error" in row[kind]:
                    break
        rows.append(row)
        say(lines([row])[1])
    return {"shape": shape, "device": device, "rows": rows}


def failure(row: Mapping[str, Any]) -> str | None:
    """Why a row has no figures, in one line."""
    errors = (row[kind].get("error") for kind in ("cold", "disk") if kind in row)
    return next(filter(None, errors), None)


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """As a table, the headings first."""
    from dit_accel.eval.text_table import aligned

    told = [
        (
            "method", "first use s", "from disk s", "again s", "kernels", "compiling s",
            "slowest s", "", "imports s", "device's start s",
        )
    ]  # fmt: skip
    for row in rows:
        failed = failure(row)
        if failed:
            told.append((row["method"], *[""] * 6, failed, "", ""))
            continue
        cold, disk = row["cold"], row["disk"]
        kernels = cold["kernels"]
        name, took = kernels["slowest"] or ("", 0.0)
        told.append(
            (
                row["method"],
                f"{cold['first']:.2f}",
                f"{disk['first']:.2f}",
                f"{cold['again']:.3f}",
                str(kernels["compiled"]),
                f"{kernels['seconds']:.2f}",
                f"{took:.2f}",
                name,
                f"{cold['imports']:.1f}",
                f"{cold['start']:.1f}",
            )
        )
    return aligned(told, right=(1, 2, 3, 4, 5, 6, 8, 9)).splitlines()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--shape", default="wan1.3b", help="one that bench_kernels knows")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    given = parser.parse_args(words)
    names = given.methods.split(",")
    for word in names:
        if word not in METHODS:
            parser.error(f"--methods: expected some of {', '.join(METHODS)}, got {word!r}")
    found = run(
        names,
        shape=given.shape,
        device=given.device,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print("\n".join(lines(found["rows"])))
    if given.out is not None:
        from dit_accel.eval.records import dumps, signed

        command = ["python", "-m", _MODULE, *(words or sys.argv[1:])]
        given.out.write_text(dumps(signed(found) | {"command": command}))
    return 1 if any(failure(row) for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
