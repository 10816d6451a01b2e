"""The prompts of a run: built in, a text file, or VBench's prompt suite."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from dit_accel.errors import InputError
from dit_accel.eval.samples import Prompt
from dit_accel.pipelines import embedded
from dit_accel.pipelines.tiny_wan import scenes

BUILTIN = "builtin"


def prompts_of(source: str, model: str, limit: int | None = None) -> tuple[Prompt, ...]:
    """The prompts that a name or file means.

    Args:
        source: ``builtin`` for those of an embedded model's evaluation, 64 of held-out
            combinations; a text file with a prompt a line, empty lines and lines that begin with
            ``#`` left out; or VBench's suite, a JSON list of objects with ``prompt_en`` and
            ``dimension``.
        model: that they are for.
        limit: take only the first ones.

    Raises:
        InputError: there are none, or the file is neither.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected a positive integer, got {limit}")
    if source == BUILTIN:
        if embedded.find(model) is None:
            raise InputError(
                f"prompts: expected a file for {model}, got {BUILTIN}, which is for "
                f"{', '.join(embedded.names())}"
            )
        found = [Prompt(i, scene.caption()) for i, scene in enumerate(scenes.evaluation_scenes())]
    else:
        found = _from_file(Path(source).expanduser())
    return tuple(found[:limit])


def _from_file(path: Path) -> list[Prompt]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompts: expected {BUILTIN} or a file, got {str(path)!r}: {error}"
        ) from None
    if path.suffix == ".json":
        return _suite(path, text)
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise InputError(f"prompts: expected at least one line in {str(path)!r}, got none")
    return [Prompt(i, line) for i, line in enumerate(found)]


def _suite(path: Path, text: str) -> list[Prompt]:
    try:
        rows: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f"prompts: expected JSON in {str(path)!r}, got {error}") from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"prompts: expected a list of objects in {str(path)!r}, got {text[:40]!r}")
    found = []
    for i, row in enumerate(rows):
        prompt = row.get("prompt_en") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(
                f"prompts: expected an object with prompt_en as entry {i} of {str(path)!r}, got "
                f"{str(row)[:60]!r}"
            )
        given = row.get("dimension", [])
        dimensions = [given] if isinstance(given, str) else given
        if not isinstance(dimensions, list) or not all(isinstance(d, str) for d in dimensions):
            raise InputError(
                f"prompts: expected names as dimension of entry {i} of {str(path)!r}, got {given!r}"
            )
        auxiliary = row.get("auxiliary_info", {})
        if not isinstance(auxiliary, dict):
            raise InputError(
                f"prompts: expected an object as auxiliary_info of entry {i} of {str(path)!r}, got "
                f"{auxiliary!r}"
            )
        found.append(Prompt(i, prompt, tuple(dimensions), auxiliary))
    return found


def scene_of(text: str) -> scenes.Scene | None:
    """The one-shape scene that a caption of the embedded domain tells; ``None`` for others."""
    return _captions().get(" ".join(text.lower().rstrip(". ").split()))


@cache
def _captions() -> dict[str, scenes.Scene]:
    every = (
        scenes.Scene((mover,), ground, texture)
        for mover in scenes.combinations()
        for ground in scenes.BACKGROUNDS
        for texture in scenes.TEXTURES
    )
    return {scene.caption(): scene for scene in every}
