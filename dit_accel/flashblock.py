"""FlashBlock: attention to what lies outside, kept from one denoising step to the next.

It changes little between steps, while attention to what lies inside changes much (arXiv
2602.05305). A *refresh* computes the outside exactly, as a partial, and keeps it; the steps after
it compute the inside alone, and merge. What is outside depends on the model:

- In block diffusion it is the prefix, the cached context of the chunk being denoised. The inner
  method acts inside the chunk, afresh in every step, and may be dense.
- In a bidirectional model it is what the inner method's plan leaves out, its exact complement. It
  belongs to the layout and the plan that made it, so both are frozen between refreshes.

One kept partial is ``L · H · (D + 2)`` halves, for each layer and each element of the batch, and
for each guidance branch that is a forward of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.attend import direct, of_prefix
from dit_accel.density import Budget, share_at
from dit_accel.errors import InputError
from dit_accel.kernels.block_attention import RestTerms
from dit_accel.layout import Blocked, Layout, Raster, Statistic, default_scale
from dit_accel.method import Method, is_among
from dit_accel.partial import Partial
from dit_accel.rest import Drop, Rest
from dit_accel.route import Route
from dit_accel.types import DROP, EXACT, Blocks, Context, Plan, TokenPlan

_SLOT = "flashblock"
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Frozen:
    """The layout and the plan whose complement was kept, and the share that was asked for."""

    queries: Blocks
    keys: Blocks
    plan: Plan | TokenPlan
    asked: float | None = None

    @property
    def bytes(self) -> int:
        """What it takes beside the partial; orders that all heads share are not the layer's own."""
        plan = self.plan.stored if isinstance(self.plan, TokenPlan) else self.plan.code
        tensors = {id(plan): plan}
        for blocks in (self.queries, self.keys):
            if blocks.perm.shape[1] > 1:
                tensors |= {id(x): x for x in (blocks.perm, blocks.offsets)}
        return sum(x.numel() * x.element_size() for x in tensors.values())


@dataclass(frozen=True, slots=True)
class Kept:
    """What a refresh leaves for the steps after it.

    Attributes:
        step: of the refresh.
        source: chunk and length of the prefix that ``partial`` is over; ``None`` where it is over
            the complement of a plan.
        partial: the outside.
        frozen: what the complement belongs to; ``None`` for a prefix.
    """

    step: int
    source: tuple[int, int] | None
    partial: Partial
    frozen: Frozen | None = None


@dataclass(frozen=True, slots=True)
class Cycle:
    """When the outside is computed, and where.

    Attributes:
        refresh: denoising steps from one refresh to the next.
        layers: that keep their outside, negative ones counted from the last; ``None`` is all.
        budget: bytes that all kept partials, and the plans that they belong to, may take together;
            ``None`` is no limit.
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
        if known is None or known.partial.out.shape != q.shape or known.source != _source(ctx):
            return None
        if known.frozen is not None and known.frozen.asked != self.asked(ctx):
            return None
        return known if 0 <= ctx.step - known.step < self.refresh else None

    def frozen(self, ctx: Context, q: Tensor) -> Frozen | None:
        """The layout and plan to use in this step; ``None`` where it makes its own."""
        known = self.kept(ctx, q)
        return None if known is None else known.frozen

    def check_budget(self, ctx: Context, q: Tensor, frozen: Frozen | None = None) -> None:
        """Raise an InputError if the partials would take more than the budget, before one is made.

        Counted are all layers that will keep one, as if their plans were all of one size, for the
        guidance branches seen so far and this.
        """
        if self.budget is None or ctx.state is None:
            return
        one = partial_bytes(q) + (0 if frozen is None else frozen.bytes)
        layers = self._count(ctx)
        others = ctx.state.branches(_SLOT) - {ctx.branch}
        needed = one * layers * (len(others) + 1)
        if needed > self.budget:
            raise InputError(
                f"flashblock: expected kept partials within a budget of {self.budget / _GIB:.3f} "
                f"GiB, got {needed / _GIB:.3f} GiB: {layers} layers x {len(others) + 1} guidance "
                f"branches x {one / _GIB:.4f} GiB"
            )

    def _count(self, ctx: Context) -> int:
        """How many layers keep something, as far as the context knows."""
        if ctx.num_layers is None:
            return ctx.layer + 1 if self.layers is None else len(set(self.layers))
        every = (replace(ctx, layer=layer) for layer in range(ctx.num_layers))
        return sum(self.applies(one) for one in every)


def _source(ctx: Context) -> tuple[int, int] | None:
    return None if ctx.prefix is None else (ctx.prefix.chunk, ctx.prefix.length)


def partial_bytes(q: Tensor) -> int:
    """Bytes of one kept partial: its output in the queries' dtype, and the lse in fp32 (fp64)."""
    batch, heads, length, depth = q.shape
    return batch * heads * length * (depth * q.element_size() + max(4, q.element_size()))


@dataclass(frozen=True, slots=True)
class FrozenLayout:
    """A layout that stands still between refreshes.

    Attributes:
        inner: which layout.
        cycle: when it may move.
        needs_prefix: why this makes sense in block diffusion only, if that is so.
    """

    inner: Layout
    cycle: Cycle
    needs_prefix: str | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None
    ) -> Blocked:
        if self.needs_prefix is not None and ctx.prefix is None:
            raise InputError(f"flashblock: {self.needs_prefix}")
        known = self.cycle.frozen(ctx, q)
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
        known = self.cycle.frozen(ctx, blocked.q)
        if known is not None:
            return known.plan
        return self.inner(blocked, rest.inner if isinstance(rest, KeptRest) else rest, ctx)


@dataclass(frozen=True, slots=True)
class Whole:
    """The route of dense attention inside a chunk: every pair, without a choice."""

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def __call__(self, blocked: Blocked, rest: Rest, ctx: Context) -> Plan:
        shape = (1, 1, blocked.queries.num_blocks, blocked.keys.num_blocks)
        return Plan(torch.ones(shape, dtype=torch.int8, device=blocked.q.device), whole=True)


@dataclass(frozen=True, slots=True)
class KeptRest:
    """The outside, computed at a refresh and kept; elsewhere the inner rest."""

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
        """Whether this step needs no statistics: layout, plan and outside are kept."""
        return self.cycle.frozen(ctx, q) is not None

    def computes_all(self, ctx: Context, q: Tensor) -> bool:
        """Whether this step computes the plan's pairs, and their complement."""
        return ctx.prefix is None and self.cycle.applies(ctx) and self.cycle.kept(ctx, q) is None

    def keeps_prefix(self, ctx: Context, q: Tensor) -> bool:
        """Whether attention to the prefix is not computed in this step."""
        return ctx.prefix is not None and self.cycle.kept(ctx, q) is not None

    def outside(self, blocked: Blocked, plan: Plan | TokenPlan, ctx: Context) -> Partial | None:
        """The partial of everything that the plan leaves out.

        ``None`` in layers that keep nothing, and where the outside is a prefix.

        Raises:
            InputError: the kept partials would take more than the budget.
        """
        if ctx.prefix is not None or not self.cycle.applies(ctx):
            return None
        known = self.cycle.kept(ctx, blocked.q)
        if known is None:
            frozen = Frozen(blocked.queries, blocked.keys, plan, self.cycle.asked(ctx))
            self.cycle.check_budget(ctx, blocked.q, frozen)
            known = Kept(ctx.step, None, direct(blocked, complement(plan), ctx), frozen)
            ctx.memory[_SLOT] = known
        return known.partial

    def of_prefix(self, q: Tensor, ctx: Context, scale: float | None = None) -> Partial:
        """The partial of the prefix, kept or computed.

        Raises:
            InputError: the kept partials would take more than the budget.
        """
        if not self.cycle.applies(ctx):
            return of_prefix(q, ctx, scale)
        known = self.cycle.kept(ctx, q)
        if known is None:
            self.cycle.check_budget(ctx, q)
            known = Kept(ctx.step, _source(ctx), of_prefix(q, ctx, scale))
            ctx.memory[_SLOT] = known
        return known.partial


def complement(plan: Plan | TokenPlan) -> Plan | TokenPlan:
    """The plan of exactly the pairs that another leaves out.

    Raises:
        InputError: the plan has pooled levels.
    """
    if isinstance(plan, TokenPlan):
        return plan.complement()
    if plan.levels:
        raise InputError(f"flashblock: {_POOLS}")
    return Plan(torch.where(plan.code == EXACT, DROP, EXACT).to(torch.int8))


_POOLS = (
    "inner: expected a method whose pairs are exact or left out, got one with pooled levels (psa), "
    "whose pooled pairs have no exact complement; in block diffusion it can be used"
)
_DENSE = (
    "inner: expected a sparse method, got dense attention, which leaves nothing out; in block "
    "diffusion it can be used"
)


def around(inner: Method, cycle: Cycle) -> Method:
    """A method with its outside kept.

    Raises:
        InputError: the inner method keeps its outside already, or is dense with a backend.
    """
    if isinstance(inner.rest, KeptRest):
        raise InputError(
            "flashblock: inner: expected a method that keeps nothing, got flashblock itself"
        )
    if inner.layout is None or inner.route is None or inner.rest is None:
        if inner.backend is not None:
            raise InputError(
                "flashblock: inner: expected dense attention without a backend, got "
                f"backend={inner.backend!r}: the chunk and its context are partials, for which one "
                "is chosen by shape"
            )
        # one block, which no kernel looks at
        layout, route, rest = FrozenLayout(Raster(2**62), cycle, _DENSE), Whole(), Drop()
        return replace(inner, layout=layout, route=route, rest=KeptRest(rest, cycle))
    reason = _POOLS if getattr(inner.route, "pools", False) else None
    cycle = replace(cycle, route=inner.route)
    return replace(
        inner,
        layout=FrozenLayout(inner.layout, cycle, reason),
        route=FrozenRoute(inner.route, cycle),
        rest=KeptRest(inner.rest, cycle),
    )


def needs_prefix(method: Method) -> str | None:
    """Why a method makes sense in block diffusion only, if that is so."""
    return method.layout.needs_prefix if isinstance(method.layout, FrozenLayout) else None


def check_layers(method: Method, layers: int, of: str) -> None:
    """Raise an InputError unless a transformer has the layers that are to keep their outside.

    Args:
        method: `flashblock`; any other fits.
        layers: of the transformer's self-attention.
        of: its name, for messages.
    """
    rest = method.rest
    chosen = rest.cycle.layers if isinstance(rest, KeptRest) and rest.cycle.layers else ()
    for layer in chosen:
        if not -layers <= layer < layers:
            raise InputError(
                f"flashblock: layers: expected layers from {-layers} to {layers - 1} of {of}, got "
                f"{layer}"
            )
