"""FlashBlock on a bidirectional model: what a plan leaves out, kept between denoising steps.

Attention to what lies outside a plan changes little from one step to the next (arXiv 2602.05305).
At a refresh the exact complement of the plan is computed as a partial, and kept with the layout and
the plan that made it; until the next refresh these are frozen, only the plan's own pairs are
computed, and the kept partial is merged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.attend import direct
from dit_accel.density import Budget, share_at
from dit_accel.errors import InputError
from dit_accel.kernels.block_attention import RestTerms
from dit_accel.layout import Blocked, Layout, Statistic, default_scale
from dit_accel.method import Method, is_among
from dit_accel.partial import Partial
from dit_accel.rest import Rest
from dit_accel.route import Route
from dit_accel.types import DROP, EXACT, Blocks, Context, Plan, TokenPlan

_SLOT = "flashblock"
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Kept:
    """What a refresh leaves for the steps after it: made at a step, for a share asked for."""

    step: int
    asked: float | None
    queries: Blocks
    keys: Blocks
    plan: Plan | TokenPlan
    partial: Partial


@dataclass(frozen=True, slots=True)
class Cycle:
    """When the outside is computed, and where.

    Attributes:
        refresh: denoising steps from one refresh to the next.
        layers: that keep their outside, negative ones counted from the last; ``None`` is all.
        budget: bytes that all kept partials together may take; ``None`` is no limit.
        route: whose plans are kept; where another share is asked of it, a refresh comes early.
    """

    refresh: int
    layers: tuple[int, ...] | None = None
    budget: int | None = None
    route: Route | None = None

    def asked(self, ctx: Context) -> float | None:
        """The share that is asked of the route here."""
        given: tuple[str, Budget] | None = getattr(self.route, "budget", None)
        return None if given is None else share_at(*given, ctx)

    def applies(self, ctx: Context) -> bool:
        """Whether this layer keeps its outside."""
        return self.layers is None or is_among("flashblock: layers", self.layers, ctx)

    def kept(self, ctx: Context, q: Tensor) -> Kept | None:
        """What this step can use; ``None`` at a refresh, and in layers that keep nothing.

        Raises:
            InputError: there is no state to keep anything in.
        """
        if not self.applies(ctx):
            return None
        if ctx.state is None:
            raise InputError(
                "flashblock: expected a state, in which the outside is kept from step to step, "
                "got none"
            )
        known: Kept | None = ctx.memory.get(_SLOT)
        if known is None or known.partial.out.shape != q.shape:
            return None
        if known.asked != self.asked(ctx):
            return None
        return known if 0 <= ctx.step - known.step < self.refresh else None

    def check_budget(self, ctx: Context, q: Tensor) -> None:
        """Raise an InputError if the partials would take more than the budget, before one is made.

        Counted are all layers that will keep one, for the guidance branches seen so far and this.
        """
        if self.budget is None or ctx.state is None:
            return
        one = partial_bytes(q)
        layers = len(self.layers) if self.layers is not None else ctx.num_layers or ctx.layer + 1
        others = ctx.state.branches(_SLOT) - {ctx.branch}
        needed = one * layers * (len(others) + 1)
        if needed > self.budget:
            raise InputError(
                f"flashblock: expected kept partials within a budget of {self.budget / _GIB:.3f} "
                f"GiB, got {needed / _GIB:.3f} GiB: {layers} layers x {len(others) + 1} guidance "
                f"branches x {one / _GIB:.4f} GiB"
            )


def partial_bytes(q: Tensor) -> int:
    """Bytes of one kept partial: its output in the queries' dtype, and the lse in fp32 (fp64)."""
    batch, heads, length, depth = q.shape
    return batch * heads * length * (depth * q.element_size() + max(4, q.element_size()))


@dataclass(frozen=True, slots=True)
class FrozenLayout:
    """A layout that stands still between refreshes."""

    inner: Layout
    cycle: Cycle

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None
    ) -> Blocked:
        known = self.cycle.kept(ctx, q)
        if known is None:
            return self.inner(q, k, v, ctx, scale)
        return Blocked(q, k, v, known.queries, known.keys, ctx.geometry, default_scale(q, scale))


@dataclass(frozen=True, slots=True)
class FrozenRoute:
    """A route whose plan stands still between refreshes."""

    inner: Route
    cycle: Cycle

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return self.inner.needs

    @property
    def budget(self) -> tuple[str, Budget] | None:
        """Of the inner route, if it has one."""
        return getattr(self.inner, "budget", None)

    def __call__(self, blocked: Blocked, rest: Rest, ctx: Context) -> Plan | TokenPlan:
        known = self.cycle.kept(ctx, blocked.q)
        if known is not None:
            return known.plan
        return self.inner(blocked, rest.inner if isinstance(rest, KeptRest) else rest, ctx)


@dataclass(frozen=True, slots=True)
class KeptRest:
    """The exact complement of a plan, computed at a refresh and kept; elsewhere the inner rest."""

    inner: Rest
    cycle: Cycle

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return self.inner.needs

    def terms(self, blocked: Blocked, ctx: Context) -> RestTerms | None:
        return self.inner.terms(blocked, ctx)

    def log_weight(self, blocked: Blocked, queries: Tensor) -> Tensor:
        return self.inner.log_weight(blocked, queries)

    def settled(self, ctx: Context, q: Tensor) -> bool:
        """Whether this step needs no statistics: everything is kept."""
        return self.cycle.kept(ctx, q) is not None

    def computes_all(self, ctx: Context, q: Tensor) -> bool:
        """Whether this step is a refresh: the plan's pairs, and their complement."""
        return self.cycle.applies(ctx) and self.cycle.kept(ctx, q) is None

    def outside(self, blocked: Blocked, plan: Plan | TokenPlan, ctx: Context) -> Partial | None:
        """The partial of everything that the plan leaves out; ``None`` in layers that keep nothing.

        Raises:
            InputError: the kept partials would take more than the budget.
        """
        if not self.cycle.applies(ctx):
            return None
        known = self.cycle.kept(ctx, blocked.q)
        if known is not None:
            return known.partial
        self.cycle.check_budget(ctx, blocked.q)
        partial = direct(blocked, complement(plan), ctx)
        asked = self.cycle.asked(ctx)
        ctx.memory[_SLOT] = Kept(ctx.step, asked, blocked.queries, blocked.keys, plan, partial)
        return partial


def complement(plan: Plan | TokenPlan) -> Plan | TokenPlan:
    """The plan of exactly the pairs that another leaves out."""
    if isinstance(plan, TokenPlan):
        return TokenPlan(~plan.select)
    if bool((plan.code > EXACT).any()):
        raise InputError(
            "flashblock: expected an inner method whose pairs are exact or left out, got pooled "
            "levels"
        )
    return Plan(torch.where(plan.code == EXACT, DROP, EXACT).to(torch.int8))


def around(inner: Method, cycle: Cycle) -> Method:
    """A method with its outside kept.

    Raises:
        InputError: the inner method is dense.
    """
    if inner.layout is None or inner.route is None or inner.rest is None:
        raise InputError("flashblock: inner: expected a sparse method, got dense attention")
    cycle = replace(cycle, route=inner.route)
    return replace(
        inner,
        layout=FrozenLayout(inner.layout, cycle),
        route=FrozenRoute(inner.route, cycle),
        rest=KeptRest(inner.rest, cycle),
    )
