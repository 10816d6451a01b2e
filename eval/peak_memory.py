"""Peak memory of one call, beyond what was there before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_RUN = (
    "import importlib, json, sys; module, name, given = sys.argv[1:]; "
    "print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(given))))"
)


def in_new_process(
    module: str,
    function: str,
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> Any:
    """Call a function in a process of its own; arguments and result are plain JSON.

    There, glibc is told to map every tensor by itself, so that memory that is freed goes back at
    once, and is neither counted as still there nor handed out again unseen.

    Args:
        module, function, arguments: what is called.
        environment: variables beside those of this process.
        seconds: how long it may take.

    Raises:
        RuntimeError: the process failed, or took longer.
    """
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RUN, module, function, json.dumps(arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **malloc, **(environment or {})},
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the process that measures took more than {seconds} s") from None
    if done.returncode:
        raise RuntimeError(f"the process that measures failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def resident_peak(call: Callable[[], object]) -> int | None:
    """Resident memory at the peak of a call over that before it, in bytes.

    The kernel's own high-water mark, which misses no moment, as sampling would. Meant for a process
    from `in_new_process`. ``None`` where Linux' ``/proc`` is not to be had.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        before = status("VmRSS")
        call()
        return status("VmHWM") - before
    except OSError:
        return None


def status(key: str) -> int:
    """Bytes of a line of ``/proc/self/status``, such as ``VmRSS``; an OSError elsewhere."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def cuda_peak(call: Callable[[], object]) -> int:
    """Allocated CUDA memory at the peak of a call over that before it, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
