"""The command line, ``dit-accel``: the roof of the house, which may know every room.

One command a module; each imports what it needs when it runs, so that ``--help`` stays quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dit_accel.errors import InputError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Bad input is told in one line, with exit code 2; ``--debug``, anywhere, shows the traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = _run(words)
    except InputError as error:
        code = _told(error, 2, debug)
    except (OSError, MemoryError) as error:
        code = _told(error, 1, debug)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    raise SystemExit(code)


def _run(words: list[str]) -> int:
    import typer

    from dit_accel.cli.app import app

    try:
        result = typer.main.get_command(app).main(
            words, prog_name="dit-accel", standalone_mode=False
        )
    except Exception as error:
        # usage errors of the parser, wherever this release of typer keeps their class
        tell = getattr(error, "format_message", None)
        if tell is None:
            raise
        text = " ".join(tell().split()).partition(", unable to parse")[0]
        print(f"error: {text}{_came(error, words)} (see dit-accel --help)", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0


def _came(error: Exception, words: list[str]) -> str:
    """What stood after the option that an error of the parser is about."""
    names = getattr(getattr(error, "param", None), "opts", ())
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names and (equals or words[i + 1 : i + 2]):
            return f", got {(value if equals else words[i + 1])!r}"
    return ""


def _told(error: BaseException, code: int, debug: bool) -> int:
    if debug:
        raise error
    line = " ".join(str(error).split()) or type(error).__name__
    print(f"error: {line}", file=sys.stderr)
    return code
