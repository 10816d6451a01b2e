"""How the heads are gone through, and their groups, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_LISTS = 0.4
"""Of what may be kept, the share that lists may take."""


class Room(NamedTuple):
    """What is kept at once.

    ``pairs``: heads whose lists are made. ``units``: groups whose partials are kept, of whole heads
    or of a part of one.
    """

    pairs: int
    units: int


def room_for(
    every: int, groups: int, budget: int, *, listed: int, ordered: int, parted: int, state: int
) -> Room:
    """How much is kept at once, at least a head's lists and a group's partials.

    Args:
        every: heads of all elements of the batch.
        groups: of a head.
        budget: bytes that all of it may take together.
        listed: bytes of a head's lists.
        ordered: of its keys and values in order.
        parted: of the partials of a group.
        state: of what goes on from a part of a head to the next.
    """
    most = min((1 - _LISTS) * budget, budget - listed)
    whole = int(most // (groups * parted + ordered))
    if whole >= 1:
        whole = min(whole, every)
        left = budget - whole * (groups * parted + ordered)
        pairs = max(1, min(every, int(left // listed)))
        # no more heads than there are lists of, and these in rounds of one size
        whole = min(whole, pairs)
        return Room(min(every, pairs // whole * whole), whole * groups)
    units = max(1, int((most - ordered - state) // parted))
    units = -(-groups // -(-groups // units))
    left = budget - units * parted - ordered - state
    pairs = max(1, min(every, int(left // listed)))
    return Room(-(-every // -(-every // pairs)), units)


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
