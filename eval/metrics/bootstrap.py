"""How sure a number is: resampling of independent samples, which are prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
FEWEST = 5
"""Of so many independent samples an interval is given, and of no fewer."""
_RESAMPLES = 4000
_EXACT = 12
_FLIPS = 20000

Values = NDArray[np.float64]


def mean(values: Values) -> Values:
    """Along the last axis."""
    return np.asarray(values.mean(-1))


def median(values: Values) -> Values:
    """Along the last axis."""
    return np.asarray(np.median(values, -1))


def interval(
    values: Sequence[float],
    statistic: Callable[[Values], Values] = mean,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float] | None:
    """A confidence interval of a statistic by the bootstrap, from percentiles.

    The percentiles are widened for few samples, as in Hesterberg, "What Teachers Should Know About
    the Bootstrap" (arXiv 1411.5279, section 5.3): plain ones cover too seldom.

    Args:
        values: of independent samples; may be infinite.
        statistic: of rows of samples, along the last axis.
        level: share of runs in which the interval covers the truth.
        seed: of the resampling.

    Returns:
        The bounds, or ``None`` for fewer than `FEWEST` samples.
    """
    count = len(values)
    if count < FEWEST:
        return None
    given = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    with np.errstate(invalid="ignore"):
        drawn = np.sort(statistic(given[rng.integers(0, count, (_RESAMPLES, count))]))
    reach = math.sqrt(count / (count - 1)) * float(stats.t.ppf((1 + level) / 2, count - 1))
    tail = float(stats.norm.cdf(-reach))
    # no interpolation: it makes NaN of infinities
    low = drawn[int(tail * (_RESAMPLES - 1))]
    high = drawn[_RESAMPLES - 1 - int(tail * (_RESAMPLES - 1))]
    return float(low), float(high)


def sign_flip_p(differences: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided p-value that paired differences have no preferred sign.

    Signs of the differences are exchanged, all ways up to 12 samples and otherwise at random, and
    the mean compared with what was found.
    """
    given = np.asarray(differences, dtype=np.float64)
    count = len(given)
    found = abs(given.mean())
    if count <= _EXACT:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
        signs = 1.0 - 2.0 * bits
    else:
        rng = np.random.default_rng(seed)
        signs = rng.choice([-1.0, 1.0], (_FLIPS, count))
        signs[0] = 1.0  # what was found is one of the ways
    means = np.abs((signs * given).mean(1))
    return float((means >= found * (1 - 1e-12)).mean())


def rarest_sign_flip_p(count: int) -> float:
    """The least that `sign_flip_p` can be for so many differences."""
    return 2.0 ** (1 - count) if count <= _EXACT else 1 / _FLIPS


def jackknife(
    groups: Sequence[Sequence[int]],
    statistic: Callable[[Sequence[int]], float],
    *,
    level: float = LEVEL,
    most: int = 20,
) -> tuple[float, float, float] | None:
    """A statistic of a whole set, with an interval from leaving out groups of it in turn.

    For statistics such as FID, which resampling with replacement would shift.

    Args:
        groups: indices of what belongs together, such as the clips of one prompt.
        statistic: of the indices that are kept.
        level: of the interval, by Student's t.
        most: groups are joined until there are no more than these.

    Returns:
        Value, low and high; ``None`` for fewer than `FEWEST` groups.
    """
    every = [index for group in groups for index in group]
    if len(groups) < FEWEST:
        return None
    joined: list[list[int]] = [[] for _ in range(min(most, len(groups)))]
    for i, group in enumerate(groups):
        joined[i % len(joined)].extend(group)
    without = np.array(
        [
            statistic([i for j, kept in enumerate(joined) if j != out for i in kept])
            for out in range(len(joined))
        ]
    )
    count = len(joined)
    error = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    reach = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    value = statistic(every)
    return value, value - reach, value + reach
