"""``dit-accel doctor``: what is installed, what can run here, and why the rest cannot."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import Annotated

import typer

from dit_accel.cli.common import out


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: of the thing.
        version: if it is installed and says so.
        works: whether it can run here.
        why: what it is for if it works, and why not if it does not.
    """

    name: str
    version: str | None
    works: bool
    why: str


def doctor(json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Say what is installed and which attention backends can run here."""
    from dit_accel.eval import records

    found = [*_packages(), *_hardware(), *_backends()]
    if json:
        record = {"findings": [asdict(finding) for finding in found]}
        typer.echo(records.dumps(records.signed(record)), nl=False)
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "what", "version", ""):
        table.add_column(heading, overflow="fold")
    for finding in found:
        mark = "[green]yes[/green]" if finding.works else "[red]no[/red]"
        table.add_row(mark, finding.name, finding.version or "", finding.why)
    out.print(table, highlight=False)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    needed = {
        "dit_accel": "this library",
        "torch": "tensors",
        "diffusers": "pipelines",
        "transformers": "text encoders",
        "torchmetrics": "fidelity",
        "imageio": "clips on disk",
    }
    found = []
    for name, use in needed.items():
        version = _version(name)
        why = use if version else f"{use}; not installed: pip install {name}"
        found.append(Finding(name, version, version is not None, why))
    found.append(_attempt("ffmpeg", "imageio-ffmpeg", "mp4 files", _ffmpeg))
    return found


def _ffmpeg() -> None:
    import imageio_ffmpeg

    imageio_ffmpeg.get_ffmpeg_exe()


def _hardware() -> list[Finding]:
    import torch

    found = [
        Finding("CPU", None, True, f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    ]
    if not torch.cuda.is_available():
        why = (
            "this build of torch has no CUDA"
            if torch.version.cuda is None
            else f"torch is built for CUDA {torch.version.cuda}, but no GPU answers"
        )
        return [*found, Finding("GPU", None, False, why)]
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        text = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
        found.append(Finding(f"GPU {i}", torch.version.cuda, True, text))
        found.append(_settings(10 * about.major + about.minor))
    return found


def _settings(architecture: int) -> Finding:
    """Which measured settings of kernels there are for an architecture."""
    from dit_accel.kernels.tuning import files

    name, parts = f"settings of kernels, sm_{architecture}", []
    for whose, path in (("shipped", files.shipped(architecture)), ("own", files.own(architecture))):
        if not path.exists():
            continue
        try:
            table = files.read(path, architecture)
        except (OSError, ValueError) as error:
            return Finding(name, None, False, " ".join(str(error).split()))
        parts.append(f"{whose}: {len(table.entries)} ({path})")
    none = "none measured, defaults everywhere; dit-accel tune-kernels measures"
    return Finding(name, None, bool(parts), "; ".join(parts) or none)


def _backends() -> list[Finding]:
    from dit_accel.kernels.dense_attention import BACKENDS

    found = [
        Finding("attention: reference", None, True, "sparse, plain torch, head by head (CPU)"),
        _attempt("attention: batched", None, "sparse, plain torch, many heads at once (GPU)", _gpu),
    ]
    for name in BACKENDS:
        package = "xformers" if name == "xformers" else None
        use = f"dense, --method dense --set backend={name}"
        found.append(_attempt(f"attention: dense {name}", package, use, partial(_dense, name)))
    for name, package, module in (
        ("triton", "triton", "triton"),
        ("flash-attn 2", "flash-attn", "flash_attn"),
        ("flash-attn 3", "flash-attn-3", "flash_attn_interface"),
    ):

        def attempt(module: str = module, package: str = package) -> None:
            if importlib.util.find_spec(module) is None:
                raise RuntimeError(f"not installed: pip install {package}")
            _gpu()

        use = "kernels" if name == "triton" else "dense, through diffusers' set_attention_backend"
        found.append(_attempt(name, package, use, attempt))
    return found


def _gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("needs a GPU, and there is none")


def _dense(backend: str) -> None:
    import torch

    from dit_accel.kernels.dense_attention import dense_attention, why_not

    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    x = torch.zeros(1, 1, 64, 64, dtype=dtype, device="cuda" if gpu else "cpu")
    reason = why_not(backend) or why_not(backend, x, x, x)
    if reason is not None:
        raise RuntimeError(reason)
    dense_attention(x, x, x, backend=backend)


def _attempt(name: str, package: str | None, use: str, attempt: Callable[[], None]) -> Finding:
    version = None if package is None else _version(package)
    try:
        attempt()
    except Exception as error:  # whatever a broken installation raises is the answer
        text = " ".join(str(error).split())
        return Finding(name, version, False, f"{use}; {text or type(error).__name__}")
    return Finding(name, version, True, use)
