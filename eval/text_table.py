"""Tables as plain text, for logs as well as terminals."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(lines: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Lines of cells with their columns under each other.

    Args:
        lines: all of one length, the headings first.
        right: columns whose cells stand at the right.

    >>> print(aligned([("a", "ms"), ("bcd", "5")], right={1}))
    a    ms
    bcd   5
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
