"""Routing by the error that a rest would leave: SVG-EAR (arXiv 2603.08982)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_accel.density import Budget, budget, share_at
from dit_accel.kernels.error_probe import error_plan
from dit_accel.layout import Blocked, Statistic
from dit_accel.types import Context, Plan

if TYPE_CHECKING:
    from dit_accel.rest import Rest


@dataclass(frozen=True, slots=True)
class ErrorAware:
    """The pairs whose stand-in would be furthest off, for what they cost.

    ``e_ij`` is the error of the rest's weights on block ``j``, seen from the mean of query block
    ``i`` (`dit_accel.kernels.error_probe`). Every row takes blocks by falling ``e_ij / (n_i n_j)``
    while their keys fit the budget of ``density`` of all keys, and at least one.

    The mean speaks for its queries only where these are alike, as in clusters; on blocks of unlike
    queries routing by score may be the better choice.

    Attributes:
        density: above 0, at most 1; by layer or by step if need be.
    """

    density: Budget = 0.22

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", budget("ErrorAware: density", self.density))

    @property
    def budget(self) -> tuple[str, Budget]:
        """The budget."""
        return "density", self.density

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def __call__(self, blocked: Blocked, rest: Rest, ctx: Context) -> Plan:
        rows, columns = blocked.queries.num_video, blocked.keys.num_video
        queries = blocked.query_mean()[:, :, :rows]
        return Plan(
            error_plan(
                queries,
                blocked.k,
                rest.log_weight(blocked, queries)[..., :columns],
                perm=blocked.keys.perm,
                offsets=blocked.keys.offsets,
                num_blocks=columns,
                scale=blocked.scale,
                key_valid=blocked.geometry.key_valid,
                density=share_at(*self.budget, ctx),
                all_rows=blocked.queries.num_blocks,
            )
        )
