"""What is written beside a result, so that it can be understood and repeated."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("dit_accel", "torch", "triton", "diffusers", "transformers", "accelerate", "numpy")


def versions() -> dict[str, str | None]:
    """Versions of Python and of what computes; ``None`` for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """Where it ran: system, processor, threads and GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def dumps(record: Any) -> str:
    """Valid JSON, indented: dataclasses as objects; infinity and other objects as text."""
    return json.dumps(_plain(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def signed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the command that made it before, and versions and machine after."""
    command = ["dit-accel", *sys.argv[1:]]
    return {"command": command, **record, "versions": versions(), "machine": machine()}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int | bool):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)
