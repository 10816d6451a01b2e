"""What a sparse method computes beside its exact pairs, counted while it runs.

As torch counts: multiplications and additions of products (`mm`, convolutions, attention), not
softmax, sorting, means or copies. A call is counted from its shapes and its plan, so that the count
is that of the operations' definitions; an implementation may do more, such as products with what a
mask takes out again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final

import torch
from torch import Tensor

from dit_accel.cluster import KMeans
from dit_accel.error_route import ErrorAware
from dit_accel.flashblock import FrozenLayout, FrozenRoute, KeptRest, Whole
from dit_accel.layout import Blocked, Layout
from dit_accel.method import Method, Trace
from dit_accel.pyramid import Pyramid
from dit_accel.recorder import span
from dit_accel.rest import Drop, Moment, Rest, Taylor
from dit_accel.route import Everything, PooledScore, Route
from dit_accel.token_route import Gate
from dit_accel.types import EXACT, REST, Context, TokenPlan

PARTS: Final = ("layout", "route", "rest")
"""What is counted here: k-means and statistics of blocks; scores; what stands in for pairs."""
SPAN: Final = "count"
"""Of the recorder, so that counting is charged to no part of a method."""
_SAMPLED: Final = 4
"""Of so many tokens PSA looks at one."""


class Tally:
    """Operations by part; numbers on a device are read when they are asked for."""

    def __init__(self) -> None:
        self._host = dict.fromkeys(PARTS, 0.0)
        self._device: dict[str, list[Tensor]] = {part: [] for part in PARTS}
        self.unknown: str | None = None

    def clear(self) -> None:
        """Count from 0 again."""
        Tally.__init__(self)

    def add(self, part: str, amount: float | Tensor) -> None:
        """Add operations to a part; a tensor is a scalar of any device."""
        if isinstance(amount, Tensor):
            self._device[part].append(amount.double())
        else:
            self._host[part] += amount

    def total(self) -> dict[str, float]:
        """Operations by part, so far."""
        return {
            part: host + (float(torch.stack(found).sum()) if found else 0.0)
            for (part, host), found in zip(self._host.items(), self._device.values(), strict=True)
        }


@dataclass(frozen=True, slots=True)
class Counted(Method):
    """A method that tells a tally what it computes.

    Attributes:
        tally: that is told.
    """

    tally: Tally = field(default_factory=Tally, compare=False)

    def trace(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, *, scale: float | None = None
    ) -> Trace:
        """As `Method.trace`."""
        # asked before the call, which changes the answers
        settled = isinstance(self.rest, KeptRest) and self.rest.settled(ctx, q)
        whole = isinstance(self.rest, KeptRest) and self.rest.computes_all(ctx, q)
        fresh = not settled and _starts(self.layout, ctx)
        call = Method.trace(self, q, k, v, ctx, scale=scale)
        with span(SPAN):
            if not settled:
                _count_layout(self, call.blocked, fresh, self.tally)
                _count_route(self.route, self.rest, call.blocked, self.tally)
            if not settled and not whole:
                _count_rest(self.rest, call, self.tally)
        return call


def counted(method: Method, tally: Tally) -> Counted:
    """The same method, telling a tally."""
    given: dict[str, Any] = {one.name: getattr(method, one.name) for one in fields(Method)}
    return Counted(**given, tally=tally)


def _heads(blocked: Blocked) -> tuple[int, int, int]:
    """Heads of the whole batch, video tokens, and channels."""
    batch, heads, _, depth = blocked.q.shape
    return batch * heads, blocked.geometry.num_video, depth


def _inner_layout(layout: Layout | None) -> Layout | None:
    return layout.inner if isinstance(layout, FrozenLayout) else layout


def _starts(layout: Layout | None, ctx: Context) -> bool:
    """Whether k-means starts from tokens in this call, and not from centroids that it kept."""
    layout = _inner_layout(layout)
    if not isinstance(layout, KMeans) or ctx.state is None:
        return True
    memory = ctx.state.slot(ctx.layer, "") if layout.share_branches else ctx.memory
    return "kmeans keys" not in memory


def _count_layout(method: Method, blocked: Blocked, fresh: bool, tally: Tally) -> None:
    heads, video, depth = _heads(blocked)
    layout = _inner_layout(method.layout)
    if isinstance(layout, KMeans):
        # an assignment each, at least one; it may stop before, which nobody tells
        rounds = max(1, layout.first_iterations if fresh else layout.next_iterations)
        clusters = blocked.queries.num_video + blocked.keys.num_video
        tally.add("layout", 2.0 * heads * video * clusters * depth * rounds)
    assert method.route is not None
    assert method.rest is not None
    if "cov" in (*method.route.needs, *method.rest.needs):
        tally.add("layout", 2.0 * heads * video * depth * depth)


def _count_route(route: Route | None, rest: Rest | None, blocked: Blocked, tally: Tally) -> None:
    heads, video, depth = _heads(blocked)
    rows, columns = blocked.queries.num_video, blocked.keys.num_video
    route = route.inner if isinstance(route, FrozenRoute) else route
    rest = rest.inner if isinstance(rest, KeptRest) else rest
    if isinstance(route, Everything | Whole):
        return
    if isinstance(route, PooledScore):
        tally.add("route", 2.0 * heads * rows * columns * depth)
    elif isinstance(route, ErrorAware):
        weights = 0 if isinstance(rest, Drop) else 2 if isinstance(rest, Moment) else 1
        tally.add("route", 2.0 * heads * rows * (video + weights * columns) * depth)
    elif isinstance(route, Gate):
        tally.add("route", 2.0 * heads * video * columns * depth)
    elif isinstance(route, Pyramid):
        tally.add("route", 2.0 * depth * _sampled(blocked, rows, columns))
    else:
        tally.unknown = f"nobody knows what the route {type(route).__name__} computes"


def _sampled(blocked: Blocked, rows: int, columns: int) -> Tensor:
    """Pairs of sampled queries and sampled keys, of all heads."""
    batch, heads = blocked.q.shape[:2]
    taken = []
    for sizes, count in (
        (blocked.queries.sizes, rows),
        (_valid_sizes(blocked), columns),
    ):
        some = sizes[..., :count].long()
        taken.append(((some + _SAMPLED - 1) // _SAMPLED).sum(-1).expand(batch, heads))
    return (taken[0] * taken[1]).sum()


def _valid_sizes(blocked: Blocked) -> Tensor:
    """Valid keys of every block."""
    padded = blocked.geometry.key_valid is not None
    return blocked.summary().count if padded else blocked.keys.sizes


def _count_rest(rest: Rest | None, call: Trace, tally: Tally) -> None:
    blocked, plan = call.blocked, call.plan
    rest = rest.inner if isinstance(rest, KeptRest) else rest
    heads, video, depth = _heads(blocked)
    batch, count = blocked.q.shape[:2]
    if isinstance(plan, TokenPlan):
        if isinstance(rest, Drop):
            return
        full = (_valid_sizes(blocked) > 0).unsqueeze(-2)
        pairs = (plan.complement().select & full).expand(batch, count, -1, -1).sum()
    else:
        sizes = blocked.queries.sizes.long().expand(batch, count, -1)
        code = plan.code.expand(batch, count, -1, -1)
        for level in plan.levels:
            keys = (_valid_sizes(blocked).long() + level - 1) // level
            pooled = ((code == level) * keys.unsqueeze(-2)).sum(-1)
            # a logit and a value for every pooled key
            tally.add("rest", 4.0 * depth * (pooled * sizes).sum())
        if isinstance(rest, Drop):
            return
        pairs = ((code == REST).sum(-1) * sizes).sum()
    # a logit and a value for every block that is left to it; one product more of its variance
    tally.add("rest", (6.0 if isinstance(rest, Moment) else 4.0) * depth * pairs)
    if isinstance(rest, Taylor | Moment) and rest.taylor is not None:
        tally.add("rest", 2.0 * heads * video * depth * depth)
        if rest.taylor == "rest" and not isinstance(plan, TokenPlan):
            rows, columns = blocked.queries.num_video, blocked.keys.num_video
            exact = code[:, :, :rows, :columns] == EXACT
            keys = exact * _valid_sizes(blocked)[..., :columns].unsqueeze(-2)
            # what a row's own blocks add to C is taken out of it
            tally.add("rest", 2.0 * depth * depth * keys.sum())
