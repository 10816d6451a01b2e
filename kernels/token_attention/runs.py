"""How much of the work is held at once: lists, ordered keys and values, partials."""

from __future__ import annotations

from typing import NamedTuple

_LISTS = 0.2
"""Of what may be kept, the share that lists may take."""


class Room(NamedTuple):
    """What is kept at once.

    Attributes:
        pairs: heads whose lists are made.
        heads: of these, whose keys and values are there in order.
        items: whose partials there is room for.
        runs: in how many runs these heads' items are gone through at most; how many there are is
            known on the device alone, where the last runs mostly find none. More than one only for
            a head by itself.
    """

    pairs: int
    heads: int
    items: int
    runs: int


def room_for(
    every: int, most: int, budget: int, *, listed: int, ordered: int, parted: int, state: int
) -> Room:
    """How much is kept at once, at least a head's lists and an item's partials.

    Args:
        every: heads of all elements of the batch.
        most: items that a head can have.
        budget: bytes that all of it may take together.
        listed: bytes of a head's lists.
        ordered: of its keys and values in order.
        parted: of the partials of an item.
        state: of what goes on from one run to the next.
    """
    some = min((1 - _LISTS) * budget, budget - listed)
    heads = min(every, int(some // (most * parted + ordered)))
    if heads >= 1:
        left = budget - heads * (most * parted + ordered)
        pairs = max(1, min(every, int(left // listed)))
        # no more heads than there are lists of, and lists in rounds of these
        heads = min(heads, pairs)
        return Room(min(every, pairs // heads * heads), heads, heads * most, 1)
    items = max(1, min(most, int((some - ordered - state) // parted)))
    left = budget - items * parted - ordered - state
    pairs = max(1, min(every, int(left // listed)))
    # rounds of one size
    return Room(-(-every // -(-every // pairs)), 1, items, -(-most // items))
