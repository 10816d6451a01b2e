"""Memory that outlives a denoising step."""

from __future__ import annotations

from typing import Any


class State:
    """What layouts, routes and rests remember from one step to the next.

    Every slot belongs to one attention layer *and* one guidance branch, so that a cache that skips
    a block, or a second guidance branch, can never shift or see what another one stored. Nothing is
    ever counted in here. A pipeline empties its state at both ends of a call.
    """

    __slots__ = ("_slots",)

    def __init__(self) -> None:
        self._slots: dict[tuple[int, str], dict[str, Any]] = {}

    def slot(self, layer: int, branch: str) -> dict[str, Any]:
        """The mutable mapping of one layer and branch, made on first use."""
        return self._slots.setdefault((layer, branch), {})

    def branches(self, key: str) -> set[str]:
        """The guidance branches of which some layer remembers something under a key."""
        return {branch for (_, branch), slot in self._slots.items() if key in slot}

    def clear(self) -> None:
        """Forget everything."""
        self._slots.clear()

    def __len__(self) -> int:
        return sum(1 for slot in self._slots.values() if slot)

    def __repr__(self) -> str:
        return f"State({sorted(key for key, slot in self._slots.items() if slot)})"
