"""What listening costs: the same generation with and without a recorder, in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from dit_accel.errors import InputError
from dit_accel.eval import instrument, operations
from dit_accel.method import Method
from dit_accel.pipelines import accelerate, restore
from dit_accel.pipelines.generate import generate
from dit_accel.pipelines.request import Request


@dataclass(frozen=True, slots=True)
class Overhead:
    """One method.

    Attributes:
        name: of the method.
        plain, recorded: denoising seconds of each repeat, in pairs.
        spans: that one generation opened.
        ratio: median over the pairs of recorded over plain time.
    """

    name: str
    plain: tuple[float, ...]
    recorded: tuple[float, ...]
    spans: int
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def run(
    pipe: Any,
    methods: Mapping[str, Method],
    request: Request,
    repeats: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Overhead]:
    """Generate with every method, plain and recorded in turn, as `eval run` records.

    Args:
        pipe: from `dit_accel.pipelines.load`; it is left with its own processors.
        methods: by name.
        request: what to generate.
        repeats: pairs that count, after one generation of each kind that does not.
        progress: called with how many generations are done, and of how many.

    Raises:
        InputError: ``repeats`` is below 1, or the request does not fit the model.
    """
    if repeats < 1:
        raise InputError(f"repeats: expected a positive integer, got {repeats}")
    total = 2 * (repeats + 1) * len(methods)
    found = []
    try:
        for i, (name, method) in enumerate(methods.items()):
            tally = operations.Tally()
            counting = operations.counted(method, tally)
            plain, recorded, spans = [], [], 0
            for j in range(repeats + 1):
                accelerate(pipe, method)
                plain.append(sum(generate(pipe, request).step_seconds))
                accelerate(pipe, counting)
                tally.clear()
                with instrument.listening(pipe) as recorder, instrument.forwards(pipe):
                    recorded.append(sum(generate(pipe, request).step_seconds))
                spans = recorder.count
                progress(2 * (i * (repeats + 1) + j + 1), total)
            ratio = median(b / a for a, b in zip(plain[1:], recorded[1:], strict=True))
            found.append(Overhead(name, tuple(plain[1:]), tuple(recorded[1:]), spans, ratio))
    finally:
        restore(pipe)
    return found


def table(found: Sequence[Overhead]) -> Table:
    """A row a method."""
    made = Table(box=None, padding=(0, 2, 0, 0))
    for i, head in enumerate(("", "plain (s)", "recorded (s)", "recorded / plain", "spans")):
        made.add_column(head, justify="right" if i else "left", no_wrap=True)
    for one in found:
        made.add_row(
            one.name,
            f"{median(one.plain):.3f}",
            f"{median(one.recorded):.3f}",
            f"{one.ratio:.3f}",
            str(one.spans),
        )
    return made
