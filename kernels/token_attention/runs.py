"""How the groups of some heads are gone through, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator


def runs(pairs: int, groups: int, units: int) -> Iterator[tuple[int, int]]:
    """The groups of some heads in runs: the first of each, and how many.

    Args:
        pairs: heads.
        groups: of a head.
        units: the most groups of a run: whole heads, or fewer than one has. A run never goes on
            into a head that it does not hold whole.
    """
    if units >= groups:
        for first in range(0, pairs * groups, units):
            yield first, min(units, pairs * groups - first)
        return
    for pair in range(pairs):
        for group in range(0, groups, units):
            yield pair * groups + group, min(units, groups - group)
