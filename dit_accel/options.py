"""Options of presets: read off a function's signature, checked by pydantic, told in one line."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dit_accel.density import ByLayer, ByStep, budget, read_budget
from dit_accel.density import plain as plain_budget
from dit_accel.errors import InputError


@dataclass(frozen=True, slots=True)
class Opt:
    """An option's annotation: ``Annotated[float, Opt("what it does"), Field(gt=0)]``.

    Attributes:
        help: one line.
        names: names it may be given by, for options that also take an object.
        protocol: what such an object must be.
        read: makes one of a mapping, as configurations have it, and of the owner, for messages.
    """

    help: str
    names: tuple[str, ...] = ()
    protocol: type | None = None
    read: Callable[[str, Mapping[str, Any]], Any] | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a preset, as a listing shows it.

    Attributes:
        name, default, help: as written.
        type: the type in words, such as ``float > 0, <= 1`` or ``raster | gilbert``.
    """

    name: str
    default: Any
    help: str
    type: str
    _hint: Any
    _opt: Opt

    @property
    def is_budget(self) -> bool:
        """Whether it may go by layer or by step."""
        return ByStep in get_args(_bare(self._hint))

    def check(self, owner: str, value: Any) -> Any:
        """The value, converted where nothing is lost.

        Raises:
            InputError: the value does not fit.
        """
        opt = self._opt
        if self.is_budget:
            return budget(f"{owner}: {self.name}", value)
        if opt.protocol is not None:
            if isinstance(value, str):
                if value in opt.names:
                    return value
            elif isinstance(value, Mapping) and opt.read is not None:
                return opt.read(owner, value)
            elif isinstance(value, opt.protocol) and not isinstance(value, type):
                return value
            hint = closest(value, opt.names)
            raise InputError(
                f"{owner}: {self.name}: expected {' | '.join(opt.names)} or a "
                f"{opt.protocol.__name__}, got {value!r}{hint}"
            )
        if isinstance(value, list):
            value = tuple(value)
        try:
            return _adapter(self._hint).validate_python(value)
        except ValidationError:
            raise InputError(
                f"{owner}: {self.name}: expected {self.type}, got {value!r}"
                f"{closest(value, self.type.split(' | '))}"
            ) from None

    def parse(self, owner: str, text: str) -> Any:
        """The value that a command line's ``name=text`` means.

        Numbers, ``true``/``false`` and ``none`` are read as such, ``1,2`` as a tuple, anything else
        as a name. A budget may be ``0.3,0.2`` by layer, or ``0:1.0,0.2:0.15`` by step.
        """
        if self.is_budget:
            return self.check(owner, read_budget(text))
        bare = _bare(self._hint)
        if get_origin(bare) is tuple:
            return self.check(owner, _read(text, wants_tuple=True))
        value = _read(text, wants_tuple=False)
        among_others = any(get_origin(_bare(choice)) is tuple for choice in get_args(bare))
        if among_others and ("," in text or isinstance(value, int | float)):
            value = _read(text, wants_tuple=True)
        return self.check(owner, value)


def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def _read(text: str, *, wants_tuple: bool) -> Any:
    text = text.strip()
    if wants_tuple:
        inner = text.strip("()[] ")
        return tuple(_read(part, wants_tuple=False) for part in inner.split(",") if part.strip())
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _type_in_words(hint: Any, opt: Opt) -> str:
    if opt.names:
        return " | ".join(opt.names)
    bare, extras = _bare(hint), get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    if ByStep in get_args(bare):
        return "float > 0, <= 1, by layer or by step"
    if bare is type(None):
        return "none"
    args = get_args(bare)
    if get_origin(bare) is tuple:
        count = "" if Ellipsis in args else f"{len(args)} "
        word = f"tuple of {count}{args[0].__name__}"
    elif args and all(not isinstance(arg, type) and get_origin(arg) is None for arg in args):
        word = " | ".join("none" if arg is None else str(arg) for arg in args)
    elif args:
        word = " | ".join(_type_in_words(arg, Opt("")) for arg in args)
    else:
        word = bare.__name__
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{signs[key]} {getattr(bound, key)}"
        for extra in extras
        if isinstance(extra, FieldInfo)
        for bound in extra.metadata
        for key in signs
        if hasattr(bound, key)
    ]
    return f"{word} {', '.join(bounds)}" if bounds else word


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The options that a function's keyword parameters declare; ``**options`` declares none.

    Raises:
        TypeError: a parameter has no `Opt` or no default: a mistake in the preset.
    """
    hints = get_type_hints(function, include_extras=True)
    found: dict[str, Option] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        hint = hints[name]
        opts = [extra for extra in get_args(hint)[1:] if isinstance(extra, Opt)]
        if len(opts) != 1 or parameter.default is inspect.Parameter.empty:
            raise TypeError(f"{function.__name__}: {name} needs a default and one Opt(...)")
        found[name] = option_of(name, hint, parameter.default, opts[0])
    return found


def option_of(name: str, hint: Any, default: Any, opt: Opt) -> Option:
    """The option of a name, a type and a default."""
    return Option(name, default, opt.help, _type_in_words(hint, opt), hint, opt)


def checked(owner: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """All options with their effective values.

    Raises:
        InputError: an option is unknown, or a value does not fit.
    """
    for name in given:
        find(owner, options, name)
    return {
        name: option.check(owner, given[name]) if name in given else option.default
        for name, option in options.items()
    }


def find(owner: str, options: Mapping[str, Option], name: str) -> Option:
    """The option of this name.

    Raises:
        InputError: there is none.
    """
    if name not in options:
        raise InputError(
            f"{owner}: expected an option among {', '.join(options)}, got {name!r}"
            f"{closest(name, options)}"
        )
    return options[name]


def closest(word: object, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing when nothing is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1) if isinstance(word, str) else []
    return f" (did you mean {near[0]!r}?)" if near else ""


def plain(value: Any) -> Any:
    """A value of an option as a configuration has it: numbers, texts, lists and mappings."""
    if isinstance(value, ByLayer | ByStep):
        return plain_budget(value)
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value.to_config() if hasattr(value, "to_config") else value
