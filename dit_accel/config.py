"""Methods as configuration: a mapping, or a file of YAML or JSON, and back.

>>> from dit_accel import Method, presets
>>> Method.from_config({"method": "pisa", "options": {"density": 0.2}}) == presets.pisa(density=0.2)
True

The record that ``dit-accel generate`` writes beside a clip is such a file too.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from dit_accel.components import COMPONENTS, describe
from dit_accel.errors import InputError
from dit_accel.method import Method
from dit_accel.options import closest, plain
from dit_accel.registry import build, catalogue

_KEYS: Final = ("method", "options", "generate")
_PARTS: Final = ("layout", "route", "rest", "schedule", "backend")


@dataclass(frozen=True, slots=True)
class Config:
    """What a configuration holds, by its three keys.

    Attributes:
        method: the name of a preset, if any is given.
        options: of the preset, unchecked.
        generate: settings of ``dit-accel generate``, unchecked.
        source: the file, for messages; empty for a mapping.
        is_record: whether it is what a generation left; then ``generate`` holds all of it.
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    generate: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    is_record: bool = False


def load(given: Mapping[str, Any] | str | Path) -> Config:
    """A configuration, its three keys told apart.

    Raises:
        InputError: there is no such file, it cannot be read, or a key is unknown.
    """
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        return _config(_read(path), str(path))
    if isinstance(given, Mapping):
        return _config(given, "")
    raise InputError(f"config: expected a mapping or a path, got {type(given).__name__}")


def method_from(given: Mapping[str, Any] | str | Path) -> Method:
    """`Method.from_config`."""
    config = load(given)
    try:
        return _build(config)
    except InputError as error:
        raise InputError(f"{config.source}{config.source and ': '}{error}") from None


def method_of(owner: str, given: Mapping[str, Any]) -> Method:
    """The method of a mapping inside of a configuration, such as FlashBlock's ``inner``.

    Args:
        owner: for messages.
        given: its ``method`` and ``options``.
    """
    try:
        return _build(_config(given, ""))
    except InputError as error:
        raise InputError(f"{owner}: {error}") from None


def config_of(method: Method) -> dict[str, Any]:
    """`Method.to_config`."""
    if _is_as_made(method):
        return {"method": method.name, "options": plain_options(method.options)}
    if method.layout is None:
        return {"method": "dense", "options": {"backend": method.backend}}
    options = {kind: describe(kind, getattr(method, kind)) for kind in COMPONENTS}
    schedule = {
        "dense_steps": method.schedule.dense_steps,
        "dense_layers": list(method.schedule.dense_layers),
        "dense_below": method.schedule.dense_below,
        "dense_backend": method.backend,
    }
    return {"method": "custom", "options": {**options, **schedule}}


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a configuration has them: texts, numbers, lists and mappings.

    Raises:
        InputError: a part is none of this library's, and has no name.
    """
    return {name: _described(name, value) for name, value in options.items()}


def _is_as_made(method: Method) -> bool:
    """Whether it is still what its preset makes of its options."""
    if not method.options or all(row.name != method.name for row in catalogue()):
        return False
    made = build(method.name, **method.options)
    return all(getattr(made, part) == getattr(method, part) for part in _PARTS)


def _described(name: str, value: Any) -> Any:
    """An option as a configuration has it; a layout, route or rest may be there as an object."""
    for kind in COMPONENTS:
        if name == kind and not isinstance(value, str | Mapping):
            return describe(kind, value)
    return plain(value)


def _build(config: Config) -> Method:
    if config.method is None:
        names = ", ".join(row.name for row in catalogue())
        raise InputError(f"method: expected one of {names}, got nothing")
    return build(config.method, **config.options)


def _config(given: Mapping[str, Any], source: str) -> Config:
    owner = f"{source}: " if source else ""
    is_record = "command" in given and "versions" in given
    if not is_record:
        for key in given:
            if key not in _KEYS:
                raise InputError(
                    f"{owner}expected keys among {', '.join(_KEYS)}, got {key!r}{_where(key)}"
                )
    method = given.get("method")
    if method is not None and not isinstance(method, str):
        raise InputError(f"{owner}method: expected the name of a preset, got {method!r}")
    options = _named(owner, "options", given.get("options"))
    generate = given if is_record else _named(owner, "generate", given.get("generate"))
    return Config(method, options, generate, source, is_record)


def _where(key: object) -> str:
    """What a key may have been meant to be."""
    if any(key in row.options for row in catalogue()):
        return " (options of the method stand under options)"
    return closest(key, _KEYS)


def _named(owner: str, key: str, given: Any) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InputError(f"{owner}{key}: expected names with their values, got {given!r}")
    return given


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # which has no types
    """YAML that says so when a key is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise InputError(f"expected {key!r} once, got it again in line {line}")
            seen.add(key)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"config: expected a file of YAML or JSON, got {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config: expected a file that can be read, got {error}") from None
    try:
        found = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: expected JSON, got {error.msg} in line {error.lineno}") from None
    except (yaml.YAMLError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        told = getattr(error, "problem", None) or error
        raise InputError(f"{path}: expected YAML, got {told}{where}") from None
    if found is None:
        found = {}
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{path}: expected names with their values, got {type(found).__name__}")
    return found
