"""``--config``: a file's settings under those of the command line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import typer

from dit_accel.errors import InputError

_OF_THE_METHOD: Final = ("density", "settings", "dense_steps", "dense_layers")
"""Parameters that stand under ``options`` in a file."""


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """A command that also takes ``--config FILE``; what the command line says comes first.

    Every parameter of the command can stand in the file under its option's name, so that a new one
    needs nothing here. The options of the method are handed over as ``configured``.

    Args:
        command: with a first parameter ``prompt``, and the parameters ``method`` and
            ``configured``.
    """
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    settings = {
        _option_name(name, hints[name]): name
        for name in signature.parameters
        if name not in ("method", "configured", *_OF_THE_METHOD)
    }

    @functools.wraps(command)
    def run(ctx: typer.Context, config: Path | None = None, **given: Any) -> None:
        configured: Mapping[str, Any] = {}
        if config is not None:
            found, configured = _read(config, settings, hints, _given(ctx, given))
            given.update(found)
        if given["prompt"] is None:
            raise InputError("prompt: expected one, or a --config that has one, got none")
        command(**given, configured=configured)

    prompt = signature.parameters["prompt"]
    about = next(extra for extra in get_args(hints["prompt"])[1:])
    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        prompt.replace(annotation=Annotated[str | None, about], default=None),
        inspect.Parameter(
            "config",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=Annotated[
                Path | None,
                typer.Option(help="YAML, or the JSON beside a clip; options given here override."),
            ],
            default=None,
        ),
        *(
            parameter.replace(annotation=hints[name])
            for name, parameter in signature.parameters.items()
            if name not in ("prompt", "configured")
        ),
    ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _option_name(name: str, hint: Any) -> str:
    """As a file has it: ``--negative-prompt`` is ``negative_prompt``."""
    for extra in get_args(hint)[1:]:
        # typer keeps the first of them as the default, until it reads the annotation itself
        for word in (getattr(extra, "default", None), *(getattr(extra, "param_decls", None) or ())):
            if isinstance(word, str) and word.startswith("--"):
                return str(word.removeprefix("--").partition("/")[0].replace("-", "_"))
    return name


def _given(ctx: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line said itself."""
    return {
        name: value
        for name, value in values.items()
        if getattr(ctx.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
    }


def _read(
    path: Path, settings: Mapping[str, str], hints: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Parameters that the file sets, and options of its method unless another was asked for."""
    from dit_accel import presets
    from dit_accel.config import load
    from dit_accel.options import Opt, closest, option_of

    config = load(path)
    found = {}
    for key, value in config.generate.items():
        if key not in settings:
            if config.is_record:
                continue  # what was measured
            raise InputError(
                f"{path}: generate: expected settings among {', '.join(settings)}, got {key!r}"
                f"{closest(key, settings)}"
            )
        name = settings[key]
        if value is not None and name not in given:
            hint, is_path = _in_a_file(hints[name])
            value = option_of(f"generate.{key}", hint, None, Opt("")).check(str(path), value)
            found[name] = Path(value) if is_path else value
    if config.method is None:
        if config.options:
            raise InputError(f"{path}: method: expected one beside options, got none")
        return found, {}
    if given.get("method", config.method) != config.method:
        return found, {}
    try:
        presets.build(config.method, **config.options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return {**found, "method": config.method}, config.options


def _in_a_file(hint: Any) -> tuple[Any, bool]:
    """The type that a setting has in a file, and whether it is a path, which is a text there."""
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    is_path = Path in (bare, *get_args(bare))
    return (str if is_path else bare), is_path
