"""Files and folders written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file or folder under a temporary name, and move it to ``path``.

    Raises:
        Exception: whatever ``write`` raises; what was at ``path`` is then as before.
    """
    path = path.absolute()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as room:
        part = Path(room) / path.name
        write(part)
        if path.is_dir() or (path.exists() and part.is_dir()):
            old = Path(room) / "replaced"
            path.rename(old)
        os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    replace_with(path, lambda part: part.write_text(text, encoding="utf-8"))
