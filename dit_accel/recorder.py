"""Where the time goes, told by the code that spends it. Without a listener it costs nothing.

The algebra marks its parts with `span`; whoever wants to know opens a `recording`. Spans may nest:
each is charged with its own time, without that of the spans inside it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import torch

Stamp = float | torch.cuda.Event
"""A moment: seconds of the host's clock, or an event in the stream of a GPU."""

_OFF: Final = nullcontext()
_active: Recorder | None = None


def span(name: str) -> AbstractContextManager[None]:
    """Charge what happens inside to a part of this name, if anybody is recording."""
    return _OFF if _active is None else _active.span(name)


@contextlib.contextmanager
def recording(device: torch.device | str) -> Iterator[Recorder]:
    """Listen to every `span` inside; ``device`` says whose clock counts.

    Raises:
        RuntimeError: somebody is listening already.
    """
    global _active
    if _active is not None:
        raise RuntimeError("recording: expected one at a time, got one inside another")
    _active = Recorder(device)
    try:
        yield _active
    finally:
        _active = None


class Watch:
    """The clock of a device: on a GPU an event in its stream, so that the host never waits."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"

    def now(self) -> Stamp:
        """This moment."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # the device need not be the current one
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        """Until the device has done everything that it was told."""
        if self._cuda:
            torch.cuda.synchronize(self._device)

    @staticmethod
    def seconds(start: Stamp, stop: Stamp) -> float:
        """From one moment to another; of a GPU's only after `wait`."""
        if isinstance(start, float) and isinstance(stop, float):
            return stop - start
        assert not isinstance(start, float)
        assert not isinstance(stop, float)
        return float(start.elapsed_time(stop)) / 1e3


@dataclass(slots=True)
class _Span:
    name: str
    layer: int | None
    parent: _Span | None
    start: Stamp
    stop: Stamp | None = None


class Recorder:
    """Keeps the spans of one recording. Of one thread: spans in others are not to be opened."""

    def __init__(self, device: torch.device | str) -> None:
        self._watch = Watch(device)
        self._spans: list[_Span] = []
        self._open: _Span | None = None

    def begin(self, name: str, layer: int | None = None) -> None:
        """Open a span; ``layer`` marks one whose whole time, its parts included, is a layer's."""
        self._open = _Span(name, layer, self._open, self._watch.now())
        self._spans.append(self._open)

    def end(self) -> None:
        """Close the span opened last."""
        assert self._open is not None
        self._open.stop = self._watch.now()
        self._open = self._open.parent

    @contextlib.contextmanager
    def span(self, name: str, layer: int | None = None) -> Iterator[None]:
        """Both."""
        self.begin(name, layer)
        try:
            yield
        finally:
            self.end()

    @property
    def count(self) -> int:
        """How many spans were opened."""
        return len(self._spans)

    def parts(self) -> dict[str, float]:
        """Seconds by name; spans within a span are not counted twice."""
        seconds: dict[str, float] = {}
        for one, took in self._durations():
            seconds[one.name] = seconds.get(one.name, 0.0) + took
            if one.parent is not None:
                seconds[one.parent.name] = seconds.get(one.parent.name, 0.0) - took
        return seconds

    def layers(self, *without: str) -> dict[int, float]:
        """Seconds by layer, less those of spans of some names directly within it."""
        seconds: dict[int, float] = {}
        for one, took in self._durations():
            if one.layer is not None:
                seconds[one.layer] = seconds.get(one.layer, 0.0) + took
            elif one.name in without and one.parent is not None and one.parent.layer is not None:
                layer = one.parent.layer
                seconds[layer] = seconds.get(layer, 0.0) - took
        return dict(sorted(seconds.items()))

    def _durations(self) -> Iterator[tuple[_Span, float]]:
        self._watch.wait()
        for one in self._spans:
            if one.stop is not None:
                yield one, self._watch.seconds(one.start, one.stop)
