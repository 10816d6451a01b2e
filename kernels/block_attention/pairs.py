"""How many pairs a plan computes, counted by whoever makes a list of a row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_pairs(pairs, bounds, keys):
    """Add a row's keys, once for each of its queries: whole numbers, the same in any order.

    ``pairs`` int64, of the row's head; ``bounds`` int32, where the row's queries begin and end.
    """
    queries = tl.load(bounds + 1) - tl.load(bounds)
    tl.atomic_add(pairs, keys.to(tl.int64) * queries.to(tl.int64), sem="relaxed")
