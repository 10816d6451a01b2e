"""What several commands share."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dit_accel.errors import InputError

out = Console()
"""For results."""
err = Console(stderr=True)
"""For progress and warnings."""


def progress(*, shown: bool = True) -> Progress:
    """A progress bar, on stderr; of several processes one shows it."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not shown,
    )


def print_wide(table: Table) -> None:
    """Print a table without shortening it; a narrow terminal wraps its lines."""
    wide = table.__rich_measure__(out, out.options.update(width=1000)).maximum
    # a console prints nothing wider than itself, whatever width its print is given
    console = Console(file=out.file, width=max(out.width, wide))
    console.print(table, crop=False, soft_wrap=True)


def quiet() -> None:
    """Take the loading bars of other libraries away, and tell our warnings in one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # which diffusers imports, and which says on import what doctor says when asked
    logging.getLogger("xformers").setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()

    from dit_accel.pipelines.embedded import VocabularyWarning

    def show(message: Any, category: type[Warning], *rest: Any, **named: Any) -> None:
        err.print(f"[yellow]warning:[/yellow] {message}", highlight=False)

    warnings.showwarning = show
    warnings.simplefilter("once", VocabularyWarning)


def parse_set(
    preset: str, words: Iterable[str], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The options that ``--set name=value`` asks for, over those of a configuration file.

    Raises:
        InputError: there is no ``=``, the option is unknown or given twice, or does not fit.
    """
    from dit_accel import presets

    options = dict(given or {})
    texts: dict[str, str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise InputError(f"--set: expected name=value, got {word!r}")
        if name in texts:
            raise InputError(f"--set: expected {name} once, got it twice")
        texts[name] = text
    # what others depend on comes first, and options of parts last
    for name in sorted(texts, key=lambda name: (name != presets.get(preset).inherits, "." in name)):
        options[name.partition(".")[0]] = presets.parse_option(preset, name, texts[name], options)
    return options


def method_options(
    method: str,
    density: str | float | None = None,
    settings: Iterable[str] = (),
    dense_steps: str | None = None,
    dense_layers: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Options of a preset from a command line, over those of a configuration file.

    Raises:
        InputError: the preset or an option is unknown, given twice, or does not fit.
    """
    from dit_accel import presets

    presets.get(method)
    words = [
        f"{name}={value}"
        for name, value in (
            ("density", density),
            ("dense_steps", dense_steps),
            ("dense_layers", dense_layers),
        )
        if value is not None
    ]
    return parse_set(method, [*words, *settings], given)


def shared_options(given: Any) -> dict[str, dict[str, Any]]:
    """Options by method, from ``--set method.name=value`` or from YAML's mappings.

    Raises:
        InputError: a method or an option is unknown, or does not fit.
    """
    if isinstance(given, Mapping):
        if not all(isinstance(options, Mapping) for options in given.values()):
            raise InputError(f"set: expected options by method, got {dict(given)!r}")
        return {str(method): dict(options) for method, options in given.items()}
    words: dict[str, list[str]] = {}
    for word in given or ():
        method, dot, rest = str(word).partition(".")
        if not dot or "=" in method:
            raise InputError(f"--set: expected method.name=value, got {word!r}")
        words.setdefault(method.strip(), []).append(rest)
    return {method: parse_set(method, listed) for method, listed in words.items()}


def dtype_of(name: str | None) -> Any:
    """A torch dtype by name, such as ``bf16`` or ``float32``.

    Raises:
        InputError: there is none of this name.
    """
    import torch

    known = {
        "fp32": torch.float32,
        "float32": torch.float32,
        "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "fp16": torch.float16,
        "float16": torch.float16,
    }
    if name is None:
        return None
    if name not in known:
        raise InputError(f"dtype: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def device_of(name: str | None) -> str:
    """The device asked for, or the GPU if there is one, or the CPU."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")
