"""Which method, at which setting, is best for a given loss of fidelity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from dit_accel.eval.figures import Figure, Summary, VariantSummary

LADDER: Final = (50.0, 45.0, 40.0, 35.0, 30.0, 25.0, 20.0)
"""Least PSNR to dense that may be asked for, in dB."""

Gain = Literal["speedup", "density"]


@dataclass(frozen=True, slots=True)
class Answer:
    """The best of a run under a condition.

    Attributes:
        least: PSNR that was asked for, in dB; ``None`` without a condition.
        variant: the best; ``None`` if only dense fulfils it.
    """

    least: float | None
    variant: VariantSummary | None


def gain_of(summary: Summary) -> Gain:
    """What methods are ordered by: speed-up, or density where nothing was faster than dense."""
    for variant in methods(summary):
        figure = variant.figures.get("speedup")
        if figure is not None and (figure.value if figure.low is None else figure.low) > 1:
            return "speedup"
    return "density"


def methods(summary: Summary) -> list[VariantSummary]:
    """The variants that are neither dense nor the noise floor, and have samples."""
    return [v for v in summary.variants if v.role == "method" and v.samples]


def answers(summary: Summary) -> list[Answer]:
    """The best for every rung of the ladder, from the highest; rungs of one answer taken together.

    Empty if dense attention is the answer everywhere.
    """
    gain = gain_of(summary)
    found: list[Answer] = []
    for least in LADDER:
        best = best_of(methods(summary), gain, least)
        if found and _slug(found[-1].variant) == _slug(best):
            if best is None:  # what no method reaches begins at the lowest of these rungs
                found[-1] = Answer(least, None)
        else:
            found.append(Answer(least, best))
    return found if any(answer.variant for answer in found) else []


def _slug(variant: VariantSummary | None) -> str | None:
    return None if variant is None else variant.slug


def best_of(
    variants: Sequence[VariantSummary], gain: Gain, least: float | None
) -> VariantSummary | None:
    """The fastest (or, by density, the sparsest) whose PSNR is at least so much.

    A method that is slower than dense is never the fastest.
    """
    fit = []
    for variant in variants:
        psnr, figure = variant.figures.get("psnr"), variant.figures.get(gain)
        if figure is None or psnr is None or (least is not None and psnr.value < least):
            continue
        if gain == "speedup" and figure.value <= 1:
            continue
        fit.append((figure.value if gain == "speedup" else -figure.value, psnr.value, variant))
    return max(fit, key=lambda item: item[:2])[2] if fit else None


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats in both, by rising x; larger is better."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    kept: list[int] = []
    best = -math.inf
    for i in order:
        if points[i][1] > best:
            kept.append(i)
            best = points[i][1]
    return kept[::-1]


def finite(figure: Figure | None) -> Figure | None:
    """A figure that can be drawn."""
    return figure if figure is not None and math.isfinite(figure.value) else None
