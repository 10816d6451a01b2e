"""What time it is in a generation: the step, the guidance branch, and whether a call just began.

Nobody tells a transformer this. In order of trust: the cache context of diffusers where a pipeline
fills it, the host-side index of the scheduler, and, where neither can be right, the values of the
timesteps. Only the last one makes the host wait for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Told(Protocol):
    """What diffusers' ``CacheContext`` says of a forward."""

    name: str
    step_index: int | None
    num_inference_steps: int | None


@dataclass(frozen=True, slots=True)
class Moment:
    """Where one forward of a transformer stands.

    Attributes:
        step: denoising step, from 0.
        num_steps: how many there are; ``None`` when nobody says.
        branch: name of the guidance branch, such as ``cond``, or its ordinal within the step.
        first: whether this forward begins a new call of the pipeline.
    """

    step: int
    num_steps: int | None
    branch: str
    first: bool


class Clock:
    """Tells the time of every forward, in the order in which they happen.

    A call is one denoising loop. It begins when the scheduler got new timesteps (every
    ``set_timesteps`` makes a new tensor), after `reset`, or when the step goes back.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """The next forward begins a call."""
        # kept alive, so that a new tensor cannot come to stand at the old one's address
        self._timesteps: Any = None
        self._step: int | None = None
        self._offset: int | None = None
        self._seen: list[str] = []
        self._branches = 1
        self._last: Any = None
        self._by_value = False

    def tick(
        self,
        *,
        told: Told | None = None,
        scheduler: Any = None,
        timestep: Any = None,
    ) -> Moment:
        """The moment of the forward that is about to run.

        Args:
            told: the cache context, where there is one.
            scheduler: the pipeline's, where there is a pipeline.
            timestep: as the transformer was given it, any shape; the values are compared only when
                the others cannot be right.
        """
        timesteps = getattr(scheduler, "timesteps", None)
        first = self._step is None or timesteps is not self._timesteps
        if first:
            self.reset()
            self._timesteps = timesteps
        name = None if told is None else told.name
        index, total = None, None
        if told is not None and told.step_index is not None:
            index, total = told.step_index, told.num_inference_steps
        elif not self._by_value:
            index, total = self._of_scheduler(scheduler, timesteps)
        self._by_value = index is None
        if index is not None and index == self._step and self._unexpected(name):
            # the index did not move: another branch, unless somebody else drives the transformer
            self._by_value = told is None or told.step_index is None
            self._by_value &= _value(timestep) != _value(self._last)
        if self._by_value:
            index, total = self._of_value(timestep), None
        assert index is not None
        if self._step is not None and index < self._step:
            by_value = self._by_value
            self.reset()
            self._timesteps, self._by_value, first = timesteps, by_value, True
            index = max(index, 0)
        if index != self._step:
            self._branches = max(self._branches, len(self._seen))
            self._seen = []
        again = 0 if name is None else sum(seen.split("#")[0] == name for seen in self._seen)
        branch = str(len(self._seen)) if name is None else f"{name}#{again}" if again else name
        self._seen.append(branch)
        self._step, self._last = index, timestep
        return Moment(index, total, branch, first)

    def _of_scheduler(self, scheduler: Any, timesteps: Any) -> tuple[int | None, int | None]:
        """Step and number of steps by the scheduler; nothing if it cannot be driving this."""
        if timesteps is None or not hasattr(scheduler, "step_index"):
            return None, None
        index = scheduler.step_index
        begin = getattr(scheduler, "begin_index", None)
        if index is None:
            self._offset = begin
            step = 0
        else:
            if self._offset is None:
                # without set_begin_index the offset shows after the first step
                moved = 0 if self._step is None else self._step + 1
                self._offset = index - moved if begin is None else begin
            step = index - self._offset
        total = len(timesteps) - (self._offset or 0)
        if not 0 <= step < total:
            return None, None
        return step, total

    def _unexpected(self, name: str | None) -> bool:
        """Whether one more forward in this step needs a closer look."""
        return len(self._seen) >= self._branches if name is None else name in self._seen

    def _of_value(self, timestep: Any) -> int:
        """Timesteps fall from step to step; -1 when they rose, which begins a call."""
        if self._step is None:
            return 0
        now, last = _value(timestep), _value(self._last)
        return self._step if now == last else self._step + 1 if now < last else -1


def _value(timestep: Any) -> float:
    """The largest of the timesteps; Wan2.2-5B has one for every token."""
    return 0.0 if timestep is None else float(torch.as_tensor(timestep).max())
