"""Rests: what stands in for the pairs of blocks that are not computed exactly.

A rest says what a kernel must add for every block that a plan leaves to it; the kernel adds it
under the same softmax normaliser as the exact pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.kernels.block_attention import RestTerms
from dit_accel.layout import Blocked, Statistic
from dit_accel.types import Context

FirstOrder = Literal["global", "rest"]


@runtime_checkable
class Rest(Protocol):
    """Stands in for what is not computed exactly.

    One that remembers may also have ``outside(blocked, plan, ctx) -> Partial | None``, a partial of
    everything that the plan leaves out, in place of `terms`; ``of_prefix(q, ctx, scale) ->
    Partial``, that of the prefix; and tell of a step, before it runs, by ``(ctx, q) -> bool``:
    ``settled``, no statistics are needed; ``computes_all``, every pair will be computed;
    ``keeps_prefix``, the prefix's partial is at hand.
    """

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Parts of the summary that it reads."""

    def terms(self, blocked: Blocked, ctx: Context) -> RestTerms | None:
        """What a kernel needs to know; ``None`` when nothing stands in."""

    def log_weight(self, blocked: Blocked, queries: Tensor) -> Tensor:
        """Logarithm of the weight that each key of a block gets from a query.

        Args:
            blocked: the keys and their blocks.
            queries: ``[B, H, N, D]``, unscaled, fp32 (fp64).

        Returns:
            ``[B, H, N, Nk]``; ``-inf`` where nothing stands in.
        """


@dataclass(frozen=True, slots=True)
class Drop:
    """Nothing: pairs that are not exact are left out."""

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def terms(self, blocked: Blocked, ctx: Context) -> RestTerms | None:
        return None

    def log_weight(self, blocked: Blocked, queries: Tensor) -> Tensor:
        return queries.new_full((*queries.shape[:3], blocked.keys.num_blocks), -torch.inf)


@dataclass(frozen=True, slots=True)
class Centroid:
    """A block's mean value, weighted by the query's affinity to its mean key.

    Weight ``n_j exp(s q·k̄_j)``, value ``v̄_j``: SVG-EAR's compensation (arXiv 2603.08982).
    """

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def terms(self, blocked: Blocked, ctx: Context) -> RestTerms | None:
        summary = blocked.summary()
        return RestTerms(summary.k_mean, summary.v_mean, summary.count)

    def log_weight(self, blocked: Blocked, queries: Tensor) -> Tensor:
        return _centroid_logits(blocked, queries)


@dataclass(frozen=True, slots=True)
class Taylor:
    """`Centroid`, and PISA's first-order term (arXiv 2602.01077).

    The numerator gains ``s (q C) g / L``, where ``g = Σ_{j∈R} w_j n_j`` is the rest's share of the
    normaliser.

    Attributes:
        taylor: ``"global"``, the paper's kernel: ``C`` sums over *all* video key blocks, and ``L``
            counts the valid tokens in them (all tokens, when there is no text). ``"rest"``: ``C``
            sums over the blocks the row leaves to the rest, and ``L`` counts their valid tokens.
            ``None``: no such term, which is `Centroid`.
    """

    taylor: FirstOrder | None = "global"

    def __post_init__(self) -> None:
        _check_taylor("Taylor", self.taylor)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return ("cov",) if self.taylor else ()

    def terms(self, blocked: Blocked, ctx: Context) -> RestTerms | None:
        return _with_first_order(blocked, self.taylor)

    def log_weight(self, blocked: Blocked, queries: Tensor) -> Tensor:
        return _centroid_logits(blocked, queries)


@dataclass(frozen=True, slots=True)
class Moment:
    """`Taylor` with weights corrected by the second moment of the keys (ours).

    With ``σ²_nj = s² Σ_d q_nd² var_jd``, the weight ``exp(s q·k̄_j)`` is multiplied by ``1 + ½σ²``
    or by ``exp(½σ²)``: the mean of exponentials exceeds the exponential of the mean (Jensen), and
    this is how much for a small spread, or for a Gaussian one. Kin: BA-Att (arXiv 2605.19726).

    Attributes:
        weight: ``"second"`` for ``1 + ½σ²``, ``"gaussian"`` for ``exp(½σ²)``.
        taylor: the first-order term, as in `Taylor`, with the corrected weights.
    """

    weight: Literal["second", "gaussian"] = "second"
    taylor: FirstOrder | None = "global"

    def __post_init__(self) -> None:
        if self.weight not in ("second", "gaussian"):
            raise InputError(
                f"Moment: weight: expected 'second' or 'gaussian', got {self.weight!r}"
            )
        _check_taylor("Moment", self.taylor)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return ("k_var", "cov") if self.taylor else ("k_var",)

    def terms(self, blocked: Blocked, ctx: Context) -> RestTerms | None:
        k_var = blocked.summary(*self.needs).k_var
        return _with_first_order(blocked, self.taylor, k_var=k_var, weight=self.weight)

    def log_weight(self, blocked: Blocked, queries: Tensor) -> Tensor:
        k_var = blocked.summary(*self.needs).k_var
        assert k_var is not None
        half = (queries * blocked.scale).square() @ k_var.to(queries.dtype).mT * 0.5
        correction = half.log1p() if self.weight == "second" else half
        return _centroid_logits(blocked, queries) + correction


def _centroid_logits(blocked: Blocked, queries: Tensor) -> Tensor:
    return (queries * blocked.scale) @ blocked.summary().k_mean.to(queries.dtype).mT


def _check_taylor(owner: str, taylor: str | None) -> None:
    if taylor not in ("global", "rest", None):
        raise InputError(f"{owner}: taylor: expected 'global', 'rest' or None, got {taylor!r}")


def _with_first_order(blocked: Blocked, taylor: FirstOrder | None, **others: Any) -> RestTerms:
    summary = blocked.summary(*(("cov",) if taylor else ()))
    if taylor is not None:
        others |= {"cov_sum": summary.cov_sum, "cov_scope": taylor}
        others["num_video"] = blocked.keys.num_video
    return RestTerms(summary.k_mean, summary.v_mean, summary.count, **others)
