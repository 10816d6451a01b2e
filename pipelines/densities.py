"""What the attention calls of a pipeline computed, counted in pairs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.crossover import Choice, DenseWarning


@dataclass(frozen=True, slots=True)
class Record:
    """What one attention call computed: where, and how many pairs, as int64 on the device.

    What is added up is added up when it is read: a launch less for every call.

    Attributes:
        model: the transformer's name in the pipeline.
        step, layer, branch: where; step -1 is a forward that fills a KV cache.
        exact_pairs, all_pairs: ``[B, H]``, as in `dit_accel.types.Report`.
        norms: who computed norms and rotary embedding: ``"triton"``, ``"diffusers"``, or that and
            why it was not the kernel.
    """

    model: str
    step: int
    layer: int
    branch: str
    exact_pairs: Tensor
    all_pairs: Tensor
    norms: str = "diffusers"

    @property
    def exact(self) -> Tensor:
        """Pairs computed exactly, a scalar."""
        return self.exact_pairs.sum()

    @property
    def every(self) -> Tensor:
        """All pairs, a scalar."""
        return self.all_pairs.sum()


class DensityLog:
    """Densities measured in one call of a pipeline. Nothing is read from a GPU until asked for.

    Attributes:
        records: one for each attention call.
        choices: why dense attention took the place of a method, and in how many calls, where it
            did because it is faster (`dit_accel.crossover`).
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.choices: dict[str, int] = {}
        self._told: set[str] = set()

    def note(self, choice: Choice) -> None:
        """Count a call that dense attention was chosen for; the first time, it is warned of."""
        reason = choice.reason
        self.choices[reason] = self.choices.get(reason, 0) + 1
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(reason, DenseWarning, stacklevel=2)

    def clear(self) -> None:
        """Forget everything."""
        self.records.clear()
        self.choices.clear()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def density(self) -> float | None:
        """Exact pairs over all pairs, over the whole call; ``None`` before any attention."""
        return self.by(lambda record: None).get(None)

    @property
    def by_step(self) -> dict[int, float]:
        """Density of every denoising step; of all chunks together, in block diffusion."""
        found = self.by(lambda record: record.step)
        found.pop(-1, None)
        return found

    @property
    def by_layer(self) -> dict[int, float]:
        """Density of every layer."""
        return self.by(lambda record: record.layer)

    @property
    def by_cell(self) -> dict[int, dict[int, float]]:
        """Density of every denoising step, layer by layer."""
        found: dict[int, dict[int, float]] = {}
        for (step, layer), value in self.by(lambda r: (r.step, r.layer)).items():
            found.setdefault(step, {})[layer] = value
        return found

    @property
    def norm_rotary(self) -> dict[str, int]:
        """How many calls had their norms and rotary embedding from whom (`Record.norms`)."""
        return dict(Counter(record.norms for record in self.records))

    def by(self, key: Callable[[Record], Any]) -> dict[Any, float]:
        """Densities of groups of records."""
        groups: dict[Any, list[Record]] = {}
        for record in self.records:
            groups.setdefault(key(record), []).append(record)
        found = {}
        for name, records in groups.items():
            # in float: a long call of a large model counts more pairs than an int64 holds
            exact = torch.stack([record.exact.double() for record in records]).sum()
            every = torch.stack([record.every.double() for record in records]).sum()
            found[name] = float(exact / every) if every else 1.0
        return found
