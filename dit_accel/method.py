"""A method: a layout, a route, a rest and a schedule, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dit_accel.attend import attend, dense, dense_pairs, report, room_for_pairs, with_prefix
from dit_accel.density import Budget, check_layers, count_steps, share_at
from dit_accel.errors import InputError
from dit_accel.kernels.dense_attention import BACKENDS, dense_attention, why_not
from dit_accel.kernels.first_use import once
from dit_accel.layout import Blocked, Layout, default_scale
from dit_accel.partial import Partial
from dit_accel.recorder import span
from dit_accel.rest import Rest
from dit_accel.route import Route
from dit_accel.state import State
from dit_accel.types import Context, Plan, Report, TokenPlan


@dataclass(frozen=True, slots=True)
class Schedule:
    """Where a method steps aside for dense attention.

    Attributes:
        dense_steps: how many denoising steps, the first ones: a count (``int``), or a fraction of
            all steps (``float`` in ``[0, 1)``), rounded half up.
        dense_layers: layers; negative indices count from the last.
        dense_below: sequences of fewer tokens; ``"auto"`` is where a pipeline runs on a GPU that
            was measured (`dit_accel.crossover`), and nowhere else.
    """

    dense_steps: int | float = 0
    dense_layers: tuple[int, ...] = ()
    dense_below: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        steps = self.dense_steps
        is_count = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0
        if not is_count and not (isinstance(steps, float) and 0 <= steps < 1):
            raise InputError(
                "dense_steps: expected a count of steps (an integer, 0 or more) or a fraction "
                f"(0 <= fraction < 1), got {steps!r}"
            )
        layers = self.dense_layers
        if not isinstance(layers, tuple | list) or any(
            isinstance(layer, bool) or not isinstance(layer, int) for layer in layers
        ):
            raise InputError(f"dense_layers: expected a tuple of integers, got {layers!r}")
        object.__setattr__(self, "dense_layers", tuple(layers))
        below = self.dense_below
        if below != "auto" and (isinstance(below, bool) or not isinstance(below, int) or below < 0):
            raise InputError(
                f"dense_below: expected a number of tokens, 0 or more, or 'auto', got {below!r}"
            )

    def is_dense(self, ctx: Context) -> bool:
        """Whether this step of this layer is dense.

        Raises:
            InputError: ``dense_steps`` is a fraction, or a layer counts from the last, and the
                context does not know how many there are.
        """
        if self.dense_below != "auto" and ctx.geometry.length < self.dense_below:
            return True
        if self.dense_steps and ctx.step < count_steps("dense_steps", self.dense_steps, ctx):
            return True
        return is_among("dense_layers", self.dense_layers, ctx)


def is_among(option: str, layers: tuple[int, ...], ctx: Context) -> bool:
    """Whether the layer of a call is one of these; negative ones count from the last.

    Raises:
        InputError: one counts from the last, and the context does not know how many there are.
    """
    if ctx.layer in layers:
        return True
    if min(layers, default=0) >= 0:
        return False
    if ctx.num_layers is None:
        raise InputError(
            f"{option}: {layers!r} counts from the last layer, which needs num_layers; give "
            "num_layers, or layers from 0 up"
        )
    return ctx.layer - ctx.num_layers in layers


@dataclass(frozen=True, slots=True)
class Trace:
    """What a call of a sparse method went through: blocks, plan, partial and report."""

    blocked: Blocked
    plan: Plan | TokenPlan
    partial: Partial
    report: Report


@dataclass(frozen=True, slots=True)
class Method:
    """Sparse attention as four choices.

    Attributes:
        layout: orders the tokens and cuts them into blocks; ``None`` is dense attention.
        route: which pairs of blocks are exact; ``None`` is dense attention.
        rest: what stands in for the others; ``None`` is dense attention.
        schedule: where dense attention is used all the same.
        name: for reports.
        options: the effective options of the preset it came from.
        backend: who computes dense attention where it is used, a name from
            `dit_accel.kernels.dense_attention.BACKENDS`. ``None`` leaves it to the code around: in
            a pipeline diffusers' own, elsewhere torch's.
    """

    layout: Layout | None
    route: Route | None
    rest: Rest | None
    schedule: Schedule = Schedule()
    name: str = "custom"
    options: Mapping[str, Any] = field(default_factory=dict)
    backend: str | None = None

    def __post_init__(self) -> None:
        parts = (self.layout, self.route, self.rest)
        if any(part is None for part in parts) and any(part is not None for part in parts):
            raise InputError(
                "Method: expected a layout, a route and a rest, or none of the three (dense), got "
                f"{self.layout!r}, {self.route!r}, {self.rest!r}"
            )
        refuses = getattr(self.route, "refuses", None)
        reason = None if refuses is None else refuses(self.rest)
        if reason is not None:
            raise InputError(
                f"Method: expected a rest that {type(self.route).__name__} can be combined with, "
                f"got {self.rest!r}: {reason}"
            )
        if self.backend is None:
            return
        if self.backend not in BACKENDS:
            raise InputError(f"backend: expected {' | '.join(BACKENDS)}, got {self.backend!r}")
        reason = why_not(self.backend)
        if reason is not None:
            raise InputError(
                f"backend: expected one that can run here, got {self.backend!r}: {reason}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path) -> Method:
        """The method of a configuration: ``{"method": "pisa", "options": {"density": 0.2}}``.

        Args:
            config: a mapping, or the path of a YAML or JSON file; what ``dit-accel generate`` takes
                beside it, such as a prompt, may stand there too.

        Raises:
            InputError: there is no such file, or a key or value does not fit; it is named.
        """
        from dit_accel import config as configuration

        return configuration.method_from(config)

    def to_config(self) -> dict[str, Any]:
        """What `from_config` makes an equal method of: texts, numbers, lists and mappings.

        Raises:
            InputError: a part of it is none of this library's, and has no name.
        """
        from dit_accel import config as configuration

        return configuration.config_of(self)

    @property
    def density_asked(self) -> Budget | None:
        """The share of exact pairs that is asked for, if the route goes by one."""
        name, given = self.budget or ("", None)
        return given if name == "density" else None

    @property
    def period(self) -> int | None:
        """How many layers are treated in turn, each in its own way; ``None`` if all are alike."""
        found: int | None = getattr(self.layout, "period", None)
        return found

    @property
    def budget(self) -> tuple[str, Budget] | None:
        """What the route goes by, its name and value, if it has a budget."""
        return getattr(self.route, "budget", None)

    def check_layers(self, layers: int, of: str) -> None:
        """Raise an InputError if this does not fit a transformer.

        Args:
            layers: of its self-attention.
            of: its name, for messages.
        """
        for layer in self.schedule.dense_layers:
            if not -layers <= layer < layers:
                raise InputError(
                    f"dense_layers: expected layers from {-layers} to {layers - 1} of {of}, got "
                    f"{layer}"
                )
        if self.budget is not None:
            check_layers(*self.budget, layers, of)

    def is_dense(self, ctx: Context) -> bool:
        """Whether this call is left to the dense attention of the code around.

        It is not where a backend was chosen: then calling the method runs that.
        """
        return self.backend is None and self.wants_all(ctx)

    def wants_all(self, ctx: Context) -> bool:
        """Whether every pair is wanted: dense as such, by schedule, or by a share of 1 here."""
        if self.layout is None or self.schedule.is_dense(ctx):
            return True
        if self.budget is None or isinstance(self.budget[1], float):
            return False  # a plain 1 goes by way of the blocks, as Everything does
        return share_at(*self.budget, ctx) == 1

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, *, scale: float | None = None
    ) -> tuple[Tensor, Report]:
        """Attention by this method.

        Args:
            q, k, v: ``[B, H, L, D]``, one floating dtype, any strides; ``L`` as the geometry says.
            ctx: geometry, step, layer, branch and state; in block diffusion also the prefix.
            scale: of the logits; ``D ** -0.5`` by default.

        Returns:
            ``out`` ``[B, H, L, D]`` in ``q``'s dtype, and what was computed.

        Raises:
            InputError: the tensors do not fit each other or the geometry, or ask for gradients.
        """
        if self.wants_all(ctx):
            check_tensors(q, k, v, ctx)
            every = dense_pairs(q, ctx.geometry.key_valid, ctx.prefix)
            with span("attend"):
                out = self._dense(q, k, v, ctx, scale)
            return out, Report(every, every)
        partial, told = self.partial(q, k, v, ctx, scale=scale)
        return partial.out, told

    def partial(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, *, scale: float | None = None
    ) -> tuple[Partial, Report]:
        """The same with the normaliser, to be merged with attention to yet other keys.

        Args:
            q, k, v, ctx, scale: as when called.

        Raises:
            InputError: as when called; or a backend was chosen and is to compute all pairs, which
                gives no normaliser.
        """
        check_tensors(q, k, v, ctx)
        if self.layout is None or self.route is None or self.rest is None or self.wants_all(ctx):
            if self.backend is not None:
                raise InputError(
                    "backend: expected none where keys stand beside the sequence, got "
                    f"{self.backend!r}, which gives no normaliser"
                )
            every = dense_pairs(q, ctx.geometry.key_valid, ctx.prefix)
            with span("attend"):
                partial = dense(q, k, v, ctx, scale)
            return partial, Report(every, every)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise InputError(
                f"{self.name}: expected no gradients to be asked for (this is for inference); run "
                "it under torch.no_grad()"
            )
        if q.is_cuda and ctx.prefix is None:
            once(self._kernels(q, ctx), lambda: self._rehearse(q, k, v, ctx, scale))
        call = self.trace(q, k, v, ctx, scale=scale)
        return call.partial, call.report

    def _rehearse(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None) -> None:
        """This layer, and those whose kernels may be others, with a memory that nobody keeps."""
        period, last = self.period or 1, ctx.num_layers or math.inf
        near = range(ctx.layer + 1 - period, ctx.layer + period)
        for layer in {one % period: one for one in near if 0 <= one < last}.values():
            self.trace(q, k, v, replace(ctx, layer=layer, state=State()), scale=scale)

    def _kernels(self, q: Tensor, ctx: Context) -> tuple[object, ...]:
        """What decides which kernels a call launches, roughly; others are compiled alone."""
        parts = (self.layout, self.route, self.rest)
        types = (type(one) for part in parts for one in (part, getattr(part, "inner", None)))
        return (*types, q.dtype, q.shape[-1], q.device, ctx.geometry.key_valid is None)

    def trace(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, *, scale: float | None = None
    ) -> Trace:
        """One call of a sparse method with all that came between, for those who study it.

        Arguments as of a call; neither the schedule nor the tensors are looked at.

        Raises:
            InputError: the method is dense.
        """
        if self.layout is None or self.route is None or self.rest is None:
            raise InputError(f"{self.name}: trace: expected a sparse method, got dense attention")
        with span("layout"):
            blocked = self.layout(q, k, v, ctx, default_scale(q, scale))
            needs = (*self.route.needs, *self.rest.needs)
            if needs and not self._ask("settled", q, ctx):
                blocked.summary(*needs)
        whole = self._ask("computes_all", q, ctx)
        computed = 0
        if ctx.prefix is not None and not self._ask("keeps_prefix", q, ctx):
            computed = ctx.prefix.length
        with span("route"):
            plan = self.route(blocked, self.rest, ctx)
        with span("attend"):
            pairs = room_for_pairs(plan, q)
            partial = attend(blocked, plan, self.rest, ctx, pairs)
        if whole:
            every = dense_pairs(q, ctx.geometry.key_valid)
            return Trace(blocked, plan, partial, Report(every, every))
        return Trace(blocked, plan, partial, report(blocked, plan, ctx.prefix, computed, pairs))

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None) -> Tensor:
        key_valid = ctx.geometry.key_valid
        if self.backend is None:
            if ctx.prefix is not None:
                return dense(q, k, v, ctx, scale).out
            return dense_attention(q, k, v, key_valid=key_valid, scale=scale)
        if ctx.prefix is not None:
            # no backend but those of partials tells a normaliser: all keys go to it at once
            k, v, key_valid = with_prefix(q, k, v, ctx)
        reason = why_not(self.backend, q, k, v)
        if reason is not None:
            raise InputError(
                f"backend: expected one that can run this, got {self.backend!r}: {reason}"
            )
        return dense_attention(q, k, v, key_valid=key_valid, scale=scale, backend=self.backend)

    def _ask(self, question: str, q: Tensor, ctx: Context) -> bool:
        """What a rest with memory says of this step; any other rest says no."""
        answer = getattr(self.rest, question, None)
        return False if answer is None else bool(answer(ctx, q))


def check_tensors(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> None:
    """Raise an InputError unless q, k and v fit each other and the geometry. Reads no values."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise InputError(f"{name}: expected [B, H, L, D], got shape {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise InputError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.dtype.itemsize < 2:
            raise InputError(f"{name}: expected fp16, bf16, fp32 or fp64, got {tensor.dtype}")
    for what in ("shape", "dtype", "device"):
        values = getattr(q, what), getattr(k, what), getattr(v, what)
        if not values[0] == values[1] == values[2]:
            shown = ", ".join(str(list(x) if what == "shape" else x) for x in values)
            raise InputError(f"q, k, v: expected one {what}, got {shown}")
    if 0 in q.shape:
        raise InputError(f"q, k, v: expected no empty dimension, got shape {list(q.shape)}")
    where = ctx.geometry
    if where.length != q.shape[2]:
        text = f" + text {where.num_text}" if where.num_text else ""
        raise InputError(
            f"grid: expected {q.shape[2]} tokens as in q, got "
            f"{' + '.join('x'.join(map(str, grid)) for grid in where.grids)}{text} = "
            f"{where.length}"
        )
    if where.text is not None and where.text.stop > q.shape[2]:
        raise InputError(
            f"text: expected a slice within {q.shape[2]} tokens, got "
            f"slice({where.text.start}, {where.text.stop})"
        )
    valid = where.key_valid
    if valid is not None:
        expected = (q.shape[0], q.shape[2])
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
            got = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
            raise InputError(f"key_valid: expected a bool tensor, got {got}")
        if tuple(valid.shape) != expected:
            raise InputError(
                f"key_valid: expected [B, L] = {list(expected)}, got {list(valid.shape)}"
            )
        if valid.device != q.device:
            raise InputError(f"key_valid: expected device {q.device}, got {valid.device}")
