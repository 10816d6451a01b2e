"""The table of methods: how a function of options becomes a preset, and how presets are found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ParamSpec

from dit_accel.components import COMPONENTS
from dit_accel.errors import InputError
from dit_accel.method import Method
from dit_accel.options import Option, checked, closest, find, options_of

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method comes from: the title, and the number on arXiv."""

    title: str
    arxiv: str


@dataclass(frozen=True, slots=True)
class Preset:
    """One row of the table.

    Attributes:
        name: what `build` knows it by.
        summary: one line.
        paper: where it comes from; ``None`` for what is nobody's.
        deviations: where it differs from the paper, one sentence each.
        options: by name, in the order of the signature.
        make: checks options, and builds the method.
        inherits: the option that names another preset, whose options are taken as well.
    """

    name: str
    summary: str
    paper: Paper | None
    deviations: tuple[str, ...]
    options: MappingProxyType[str, Option]
    make: Callable[..., Method]
    inherits: str | None = None

    def accepts(self, given: Mapping[str, Any]) -> dict[str, Option]:
        """All options that may be given, those of an inherited preset included.

        Raises:
            InputError: the inherited preset is not known.
        """
        if self.inherits is None:
            return dict(self.options)
        own = self.options[self.inherits]
        inner = (
            own.check(self.name, given[self.inherits]) if self.inherits in given else own.default
        )
        other = get(inner).options if isinstance(inner, str) else {}
        return {**other, **self.options}


_TABLE: dict[str, Preset] = {}


def preset(
    summary: str,
    *,
    paper: Paper | None = None,
    deviations: tuple[str, ...] = (),
    inherits: str | None = None,
) -> Callable[[Callable[P, Method]], Callable[P, Method]]:
    """Register a function of keyword options as a preset, under the function's name.

    Every parameter is ``Annotated[type, Opt("help"), ...]`` with a default. A function with
    ``**options`` says with ``inherits`` which of its options names the preset that these are for.
    Calls are checked before the function runs, and the method is given the name and the effective
    options.
    """

    def register(function: Callable[P, Method]) -> Callable[P, Method]:
        name, options = function.__name__, options_of(function)

        @functools.wraps(function)
        def make(*args: P.args, **kwargs: P.kwargs) -> Method:
            if args:
                raise InputError(f"{name}: expected options by keyword only, got {args!r}")
            values = checked(name, _TABLE[name].accepts(kwargs), kwargs)
            method = function(**values)  # type: ignore[call-arg]
            return replace(method, name=name, options=values)

        _TABLE[name] = Preset(
            name, summary, paper, deviations, MappingProxyType(options), make, inherits
        )
        return make

    return register


def catalogue() -> tuple[Preset, ...]:
    """All presets, by name."""
    return tuple(_TABLE[name] for name in sorted(_TABLE))


def get(name: str) -> Preset:
    """One row of the table.

    Raises:
        InputError: there is none of this name.
    """
    if not isinstance(name, str) or name not in _TABLE:
        is_file = str(name).endswith((".yaml", ".yml", ".json"))
        hint = " (a file is read by Method.from_config)" if is_file else closest(name, _TABLE)
        raise InputError(f"method: expected one of {', '.join(sorted(_TABLE))}, got {name!r}{hint}")
    return _TABLE[name]


def build(name: str, **options: Any) -> Method:
    """The method of a preset.

    Args:
        name: of the preset.
        options: its options; see `catalogue`.

    Raises:
        InputError: the name, an option or a value is not known or does not fit.
    """
    return get(name).make(**options)


def parse_option(
    name: str, key: str, text: str, given: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """The value that ``--set key=text`` means for a preset.

    Args:
        name: of the preset.
        key, text: the option and what it is set to. ``layout.tile`` is the option ``tile`` of the
            layout; the value is then the layout's, with this option among its own.
        given: other options, parsed already; they may say which preset's options are inherited, and
            which layout it is.

    Raises:
        InputError: the preset or the option is unknown, or the value does not fit.
    """
    options = get(name).accepts(given)
    key, dot, inner = key.partition(".")
    option = find(name, options, key)
    if not dot:
        return option.parse(name, text)
    chosen = given.get(key, option.default)
    chosen = chosen if isinstance(chosen, Mapping) else {"name": chosen}
    component = COMPONENTS.get(key, {}).get(chosen["name"])  # type: ignore[call-overload]
    if component is None:
        raise InputError(f"{name}: expected an option without parts, got {key}.{inner}")
    value = find(f"{name}: {key}", component.options, inner).parse(name, text)
    return option.check(name, {**chosen, inner: value})
