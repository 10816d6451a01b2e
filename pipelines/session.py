"""What a pipeline's processors share: facts of the running forward, state, densities."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.attend import dense_pairs
from dit_accel.errors import InputError
from dit_accel.method import Method
from dit_accel.pipelines.clock import Clock, Moment
from dit_accel.state import State
from dit_accel.types import Context, Geometry, Report

ATTRIBUTE = "_dit_accel"
"""Name under which a transformer keeps its session, and an attention module its `Binding`."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one attention call computed: where, and how many pairs, as int64 scalars on the device.

    Attributes:
        model: the transformer's name in the pipeline.
        step, layer, branch: where.
        exact, every: pairs computed exactly, and all pairs.
    """

    model: str
    step: int
    layer: int
    branch: str
    exact: Tensor
    every: Tensor


class DensityLog:
    """Densities measured in one call of a pipeline. Nothing is read from a GPU until asked for."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def clear(self) -> None:
        """Forget everything."""
        self.records.clear()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def density(self) -> float | None:
        """Exact pairs over all pairs, over the whole call; ``None`` before any attention."""
        return self.by(lambda record: None).get(None)

    @property
    def by_step(self) -> dict[int, float]:
        """Density of every denoising step."""
        return self.by(lambda record: record.step)

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


class Session:
    """One pipeline with its transformers, or one transformer by itself.

    Attributes:
        state: memory of the methods; empty before and after every call.
        log: densities of the latest call, kept until the next one begins.
    """

    def __init__(self, pipe: Any | None) -> None:
        # the pipeline owns the transformers, which own the session
        self._pipe = (lambda: None) if pipe is None else weakref.ref(pipe)
        self._clock = Clock()
        self._now: tuple[str, Geometry | None, Moment] | None = None
        self.state = State()
        self.log = DensityLog()
        self.hosts: dict[str, weakref.ref[nn.Module]] = {}
        self.originals: dict[str, dict[str, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self

    @property
    def models(self) -> Iterator[tuple[str, nn.Module]]:
        """The transformers, by their names in the pipeline."""
        for name, reference in self.hosts.items():
            model = reference()
            if model is not None:
                yield name, model

    def enter(self, model: str, geometry: Geometry | None, *, told: Any, timestep: Any) -> None:
        """A forward of a transformer begins; without a geometry no method can run in it."""
        pipe = self._pipe()
        moment = self._clock.tick(
            told=told,
            scheduler=getattr(pipe, "scheduler", None),
            num_timesteps=getattr(pipe, "num_timesteps", None) if told is not None else None,
            timestep=timestep,
        )
        if moment.first:
            self.state.clear()
            self.log.clear()
        self._now = model, geometry, moment

    def leave(self) -> None:
        """The call of the pipeline is over."""
        self._now = None
        self.state.clear()
        self._clock.reset()

    def context(self, binding: Binding) -> Context:
        """Where the attention call of a module happens.

        Raises:
            InputError: no forward of its transformer is under way, or its tokens make no grid.
        """
        if self._now is None or self._now[0] != binding.model:
            raise InputError(
                "attention: expected to be called by its transformer's forward, which tells the "
                "grid and the step, got a call from elsewhere"
            )
        model, geometry, moment = self._now
        if geometry is None:
            raise InputError("attention: expected tokens that make a grid, got a forward of others")
        return Context(
            geometry,
            step=moment.step,
            num_steps=moment.num_steps,
            layer=binding.layer,
            num_layers=binding.num_layers,
            # two transformers number their layers alike
            branch=f"{model}/{moment.branch}",
            state=self.state,
        )

    def record(self, binding: Binding, ctx: Context, report: Report) -> None:
        """Note what an attention call computed."""
        self.log.records.append(
            Record(
                binding.model,
                ctx.step,
                ctx.layer,
                ctx.branch,
                report.exact_pairs.sum(),
                report.all_pairs.sum(),
            )
        )


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """What an attention module is within its session."""

    session: Session
    model: str
    layer: int
    num_layers: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return self

    def context(self) -> Context:
        """Where the call happens; see `Session.context`."""
        return self.session.context(self)

    def record(self, ctx: Context, report: Report) -> None:
        """Note what the call computed."""
        self.session.record(self, ctx, report)


def binding_of(attn: nn.Module) -> Binding:
    """The binding of a self-attention module.

    Raises:
        InputError: its transformer was never prepared.
    """
    binding = getattr(attn, ATTRIBUTE, None)
    if not isinstance(binding, Binding):
        raise InputError(
            "set_attn_processor: expected a transformer prepared by dit_accel.pipelines.load or "
            f"dit_accel.pipelines.processor(pipe, ...), got a {type(attn).__name__} that was not"
        )
    return binding


class MethodProcessor:
    """What the processors of all families share; diffusers' own class is the next base.

    Attributes:
        method: what runs.
    """

    _parallel_config: Any

    def __init__(self, method: Method) -> None:
        super().__init__()
        if not isinstance(method, Method):
            raise InputError(
                f"{type(self).__name__}: expected a Method, got {type(method).__name__}"
            )
        self.method = method

    def begin(self, attn: nn.Module) -> tuple[Binding, Context]:
        """What a self-attention module is, and where its call happens.

        Raises:
            InputError: the transformer is not prepared, or the sequence is sharded.
        """
        if self._parallel_config is not None:
            raise InputError(
                f"{self.method.name}: expected the whole sequence on one device, got context "
                "parallelism, which is not supported yet"
            )
        binding = binding_of(attn)
        return binding, binding.context()

    def note_dense(self, binding: Binding, ctx: Context, hidden_states: Tensor, heads: int) -> None:
        """Record a call that diffusers' own code computes. ``hidden_states`` is ``[B, …]``."""
        where = ctx.geometry
        like = hidden_states.new_empty(()).expand(hidden_states.shape[0], heads, where.length)
        every = dense_pairs(like, where.key_valid)
        binding.record(ctx, Report(every, every))
