"""The one exception that bad input raises."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, told in one line: what was expected, and what came.

    The command line prints it without a traceback and exits with code 2. Anything else that
    escapes is a defect of ours and keeps its traceback.
    """
