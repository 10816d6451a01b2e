"""Files of measured settings: one an architecture, shipped beside this or the user's own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, field_validator

from dit_accel.kernels.atomic import write_text
from dit_accel.kernels.tuning.spaces import OPTIONS, SPACES, Kind, Setting

FORMAT: Final = 1
VARIABLE: Final = "DIT_ACCEL_TUNING"
"""Environment variable: the folder of the user's own files."""


class Entry(BaseModel):
    """What was found fastest for one kernel and one range of shapes.

    Attributes:
        op: a name of `SPACES`.
        head_dim: channels of a head.
        dtype: ``half`` or ``float``.
        tokens: the longest sequence of the range, which begins above that of the entry before.
        setting: how to launch.
        ms, default_ms: what a call took with it, and with the default of `SPACES`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: str
    head_dim: PositiveInt
    dtype: Kind
    tokens: PositiveInt
    setting: dict[str, PositiveInt]
    ms: float
    default_ms: float

    @property
    def key(self) -> tuple[str, int, str]:
        """What must be the same for an entry to be looked at."""
        return self.op, self.head_dim, self.dtype

    @field_validator("op")
    @classmethod
    def _known(cls, op: str) -> str:
        if op not in SPACES:
            raise ValueError(f"expected one of {', '.join(SPACES)}, got {op!r}")
        return op

    @field_validator("setting")
    @classmethod
    def _powers(cls, setting: dict[str, int]) -> dict[str, int]:
        for name, value in setting.items():
            if name != "num_stages" and value & (value - 1):
                raise ValueError(f"{name}: expected a power of two, got {value}")
        if not 1 <= setting.get("num_warps", 1) <= 32 or not 1 <= setting.get("num_stages", 1) <= 8:
            told = ", ".join(f"{name}={setting.get(name)}" for name in OPTIONS)
            raise ValueError(f"expected 1 to 32 warps and 1 to 8 stages, got {told}")
        return setting

    def model_post_init(self, context: object) -> None:
        names = SPACES[self.op].names
        if set(self.setting) != set(names):
            raise ValueError(
                f"setting: expected {', '.join(names)} for {self.op}, got {', '.join(self.setting)}"
            )


class Table(BaseModel):
    """A file.

    Attributes:
        format: of the file.
        architecture: compute capability, 90 for 9.0.
        device: where it was measured.
        versions: of torch and Triton there.
        entries: no two of one key and number of tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    architecture: PositiveInt
    device: str
    versions: dict[str, str | None]
    entries: tuple[Entry, ...]

    @field_validator("entries")
    @classmethod
    def _once(cls, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        seen = set()
        for entry in entries:
            where = *entry.key, entry.tokens
            if where in seen:
                raise ValueError(f"expected every entry once, got {where} twice")
            seen.add(where)
        return entries


def shipped(architecture: int) -> Path:
    """The file of an architecture that comes with the package; it need not exist."""
    return Path(__file__).with_name(_name(architecture))


def own(architecture: int) -> Path:
    """The user's file of an architecture; it need not exist.

    In the folder that ``DIT_ACCEL_TUNING`` names, or in ``dit_accel/tuning`` of the user's caches.
    """
    folder = os.environ.get(VARIABLE)
    if folder:
        return Path(folder).expanduser() / _name(architecture)
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "dit_accel" / "tuning" / _name(architecture)


def _name(architecture: int) -> str:
    return f"sm_{architecture}.json"


def read(path: Path, architecture: int) -> Table:
    """A file, checked.

    Raises:
        ValueError: it is no table of this architecture; one line, with the first thing wrong.
        OSError: it cannot be read.
    """
    try:
        table = Table.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        told = first["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"{path}: {where}: {told}; 'dit-accel tune-kernels' writes a new one"
        ) from None
    if table.architecture != architecture:
        raise ValueError(f"{path}: architecture: expected {architecture}, got {table.architecture}")
    return table


def write(path: Path, table: Table) -> None:
    """Write a table, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _text(table))


def _text(table: Table) -> str:
    """JSON with a line for every entry."""
    head = table.model_dump(mode="json", exclude={"entries"})
    lines = ",\n    ".join(json.dumps(one.model_dump(mode="json")) for one in table.entries)
    body = json.dumps(head, indent=2).removesuffix("\n}")
    return f'{body},\n  "entries": [\n    {lines}\n  ]\n}}\n'


def merged(before: Table | None, after: Table) -> Table:
    """A table with the entries of another that it does not have itself."""
    entries = {} if before is None else {(*one.key, one.tokens): one for one in before.entries}
    entries |= {(*one.key, one.tokens): one for one in after.entries}
    listed = tuple(entries[key] for key in sorted(entries))
    return after.model_copy(update={"entries": listed})


def settings(table: Table) -> Mapping[tuple[str, int, str], tuple[tuple[int, Setting], ...]]:
    """By operation, head size and dtype: numbers of tokens, rising, with their settings."""
    found: dict[tuple[str, int, str], list[tuple[int, Setting]]] = {}
    for entry in sorted(table.entries, key=lambda one: one.tokens):
        names = SPACES[entry.op].names
        chosen = Setting({name: entry.setting[name] for name in names})
        found.setdefault(entry.key, []).append((entry.tokens, chosen))
    return {key: tuple(listed) for key, listed in found.items()}
