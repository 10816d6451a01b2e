"""Budgets of routes: one number, one by layer, or a schedule by denoising step.

>>> from dit_accel.density import budget
>>> budget("density", {0: 1.0, 0.2: 0.15})
ByStep(stages=((0, 1.0), (0.2, 0.15)))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from dit_accel.errors import InputError

if TYPE_CHECKING:
    from dit_accel.types import Context


@dataclass(frozen=True, slots=True)
class ByLayer:
    """One share by layer, each above 0 and at most 1; as many as the transformer has layers."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise InputError("expected one share by layer, got none")
        values = enumerate(self.values)
        object.__setattr__(self, "values", tuple(_share(f"[{i}]", value) for i, value in values))

    def __str__(self) -> str:
        return f"{','.join(f'{value:g}' for value in self.values)} by layer"


@dataclass(frozen=True, slots=True)
class ByStep:
    """Shares, each above 0 and at most 1, with the denoising step from which one holds.

    Attributes:
        stages: ``(first, share)``, rising from ``first = 0``. After that either all are counts of
            steps (``int``) or all fractions of the steps (``float``, below 1), rounded half up as
            ``Schedule.dense_steps`` is: ``((0, 1.0), (0.2, 0.15))`` is as dense in its first steps
            as ``dense_steps=0.2``. Of stages that begin at one step the last holds.
    """

    stages: tuple[tuple[int | float, float], ...]

    def __post_init__(self) -> None:
        stages = tuple((_first(first), _share(f"[{first}]", share)) for first, share in self.stages)
        starts = [first for first, _ in stages]
        if not starts or starts[0] != 0:
            got = f"a first one at {starts[0]!r}" if starts else "none"
            raise InputError(f"expected a schedule that begins at step 0, got {got}")
        if any(later <= first for first, later in itertools.pairwise(starts)):
            raise InputError(f"expected steps that rise, got {starts}")
        if len({type(first) for first in starts[1:]}) > 1:
            raise InputError(
                f"expected either counts of steps or fractions of all steps, got both: {starts}"
            )
        object.__setattr__(self, "stages", stages)

    def __str__(self) -> str:
        return f"{','.join(f'{first}:{share:g}' for first, share in self.stages)} by step"


Budget: TypeAlias = float | ByLayer | ByStep
"""A share above 0 and at most 1, by layer or by step if need be."""


def budget(name: str, given: Any) -> Budget:
    """What a number, a sequence by layer or a mapping by step means.

    Args:
        name: for messages.
        given: a number; a list or tuple of them; or a mapping from the first step (``0``, ``12``,
            ``0.2``, or the same as text, since JSON has no other keys) to a number.

    Raises:
        InputError: it is none of these, or a number is not above 0 and at most 1.
    """
    try:
        if isinstance(given, ByLayer | ByStep):
            return given
        if isinstance(given, Mapping):
            return ByStep(tuple(given.items()))
        if isinstance(given, Sequence) and not isinstance(given, str):
            return ByLayer(tuple(given))
        return _share("", given)
    except InputError as error:
        text = str(error)
        raise InputError(f"{name}{'' if text.startswith('[') else ': '}{text}") from None


def read_budget(text: str) -> Any:
    """What a command line's ``0.2``, ``0.3,0.2,0.1`` or ``0:1.0,0.2:0.15`` stands for, unchecked.

    A single number comes as a float.
    """
    parts = [part.strip() for part in text.strip().strip("()[]{} ").split(",") if part.strip()]
    if ":" in text:
        pairs = [part.partition(":") for part in parts]
        return {first.strip(): _number(share) for first, _, share in pairs}
    if len(parts) > 1 or text.strip().endswith((",", "]", ")")):
        return [_number(part) for part in parts]
    return _number(text)


def share_at(name: str, given: Budget, ctx: Context) -> float:
    """The share that holds for a call.

    Raises:
        InputError: there are as many shares as another number of layers, or a fraction of the steps
            needs their number, which the context does not know.
    """
    if isinstance(given, ByStep):
        share = given.stages[0][1]
        for first, later in given.stages[1:]:
            if ctx.step < count_steps(name, first, ctx):
                break
            share = later
        return share
    if isinstance(given, ByLayer):
        layers = len(given.values) if ctx.num_layers is None else ctx.num_layers
        check_layers(name, given, layers if ctx.layer < layers else ctx.layer + 1)
        return given.values[ctx.layer]
    return given


def check_layers(name: str, given: Budget, layers: int, of: str = "") -> None:
    """Raise an InputError unless a budget by layer has as many shares as there are layers."""
    if isinstance(given, ByLayer) and len(given.values) != layers:
        raise InputError(
            f"{name}: expected one share for each of the {layers} layers{of and f' of {of}'}, got "
            f"{len(given.values)}"
        )


def count_steps(name: str, first: int | float, ctx: Context) -> int:
    """A count of steps as it is, and a fraction of all steps as a count, rounded half up.

    Raises:
        InputError: it is a fraction, and the context does not know the number of steps.
    """
    if isinstance(first, int):
        return first
    if ctx.num_steps is None:
        raise InputError(
            f"{name}: a fraction ({first!r}) needs num_steps, which is not known; give num_steps, "
            "or a count of steps"
        )
    return math.floor(first * ctx.num_steps + 0.5)


def plain(given: Budget) -> Any:
    """A budget as numbers, lists and mappings, which `budget` takes back."""
    if isinstance(given, ByLayer):
        return list(given.values)
    if isinstance(given, ByStep):
        return dict(given.stages)
    return given


def in_words(given: Any) -> str:
    """A budget, or what `plain` made of one, for a line of text."""
    given = budget("budget", given)
    return f"{given:g}" if isinstance(given, float) else str(given)


def _share(where: str, given: Any) -> float:
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not 0 < given <= 1:
        raise InputError(f"{where}{where and ': '}expected float > 0, <= 1, got {given!r}")
    return float(given)


def _first(given: Any) -> int | float:
    first = given
    if isinstance(given, str):
        is_whole = given.strip().isdecimal()
        first = int(given) if is_whole else _number(given)
    is_count = isinstance(first, int) and not isinstance(first, bool) and first >= 0
    if not is_count and not (isinstance(first, float) and 0 <= first < 1):
        raise InputError(
            "expected steps to be counts (integers, 0 or more) or fractions (0 <= fraction < 1), "
            f"got {given!r}"
        )
    return first or 0


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip()
