"""What a study of attention errors says: means, rank correlations, and where an order turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from statistics import fmean
from typing import Any, Final

from scipy.stats import spearmanr

from dit_accel.eval.attention_errors import COLUMNS
from dit_accel.eval.attention_study import Measured

CHAIN: Final = ("error", "branch", "guided", "added", "latent", "psnr")
"""From the error of one attention call to the clip; each is worse the larger, but for ``psnr``."""
LINKS: Final = {
    "branch": "inside the model",
    "guided": "by guidance",
    "added": "adding up over the steps",
    "latent": "on the trajectory",
    "psnr": "in the decoder",
}
"""What lies between each of the chain and the one before it."""
COURSE: Final = (
    "density",
    "branch",
    "guided",
    "added",
    "latent",
    "psnr",
    "ssim",
    "branch_cosine",
    "coherence",
    "amplified",
)
"""The numbers of a course that have a mean."""


@dataclass(frozen=True, slots=True)
class Row:
    """Means of one candidate.

    Attributes:
        name, kind, layout, route, rest, asked: what it is.
        captured, synthetic: `COLUMNS` and ``persistent`` over the calls of each kind; ``None``
            where nothing was measured.
        calls: how many captured calls.
        generation: means over the prompts of what `dit_accel.eval.trajectories.Course` holds.
        prompts: how many.
        latent_by_step, guided_by_step: means over the prompts.
    """

    name: str
    kind: str
    layout: str
    route: str
    rest: str
    asked: float | None
    captured: dict[str, float | None] | None
    synthetic: dict[str, float | None] | None
    calls: int
    generation: dict[str, float | None] | None
    prompts: int
    latent_by_step: tuple[float, ...]
    guided_by_step: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """Two candidates of which the one with the smaller attention error makes the worse clip.

    Attributes:
        smaller: has the smaller attention error.
        better: has the higher PSNR.
        link: where along the chain their order first turns.
        prompts, agreeing: how many prompts both were generated for, and on how many of these
            ``better`` has the higher PSNR.
        psnr: by how much, mean, in dB.
    """

    smaller: str
    better: str
    link: str
    prompts: int
    agreeing: int
    psnr: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What is told in the end.

    Attributes:
        rows: one a candidate.
        ranks: Spearman's rank correlation over the candidates of each of the `CHAIN` with the next,
            and of ``error`` with ``psnr``; positive where the order is kept.
        candidates: how many it is over.
        turns: pairs whose order turns.
    """

    rows: tuple[Row, ...]
    ranks: dict[str, float | None]
    candidates: int
    turns: tuple[Turn, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def summarise(measured: Measured) -> Summary:
    """Means, correlations and turns of everything measured.

    The chain is followed on the prompts that were both captured and generated; a candidate that
    lacks one of its numbers is not part of it.
    """
    rows = tuple(
        _row(name, told, measured) for name, told in measured.settings["candidates"].items()
    )
    whole = [row for row in rows if all(_value(row, key) is not None for key in CHAIN)]
    values = {key: [_known(row, key) for row in whole] for key in CHAIN}
    pairs = [*pairwise(CHAIN), ("error", "psnr")]
    ranks = {f"{a} to {b}": _rank(values[a], values[b], flip=b == "psnr") for a, b in pairs}
    return Summary(rows, ranks, len(whole), tuple(_turns(whole, measured)))


def _row(name: str, told: Mapping[str, Any], measured: Measured) -> Row:
    sources: dict[str, list[dict[str, Any]]] = {"captured": [], "synthetic": []}
    for (candidate, source, _), record in measured.replays.items():
        if candidate == name:
            sources[source.partition(":")[0]].append(record)
    courses = [record for (who, _), record in measured.courses.items() if who == name]
    generation = None
    if courses:
        generation = {key: _mean(record[key] for record in courses) for key in COURSE}
    return Row(
        name,
        told["kind"],
        told["layout"],
        told["route"],
        told["rest"],
        told["asked"],
        _over(sources["captured"]),
        _over(sources["synthetic"]),
        sum(len(record["calls"]) for record in sources["captured"]),
        generation,
        len(courses),
        _curve(courses, "latent_by_step"),
        _curve(courses, "guided_by_step"),
    )


def _over(replays: Sequence[Mapping[str, Any]]) -> dict[str, float | None] | None:
    if not replays:
        return None
    calls = [call for record in replays for call in record["calls"]]
    found = {key: _mean(call[key] for call in calls) for key in COLUMNS}
    found["persistent"] = _mean(record["persistent"] for record in replays)
    return found


def _curve(courses: Sequence[Mapping[str, Any]], key: str) -> tuple[float, ...]:
    return tuple(fmean(values) for values in zip(*(c[key] for c in courses), strict=True))


def _mean(values: Any) -> float | None:
    # infinity, of equal clips, is text in JSON
    known = [float(value) for value in values if value is not None]
    return fmean(known) if known else None


def _value(row: Row, key: str) -> float | None:
    source = row.captured if key == "error" else row.generation
    return None if source is None else source[key]


def _known(row: Row, key: str) -> float:
    value = _value(row, key)
    assert value is not None
    return value


def _rank(a: Sequence[float], b: Sequence[float], *, flip: bool) -> float | None:
    if len(a) < 3:
        return None
    found = float(spearmanr(a, [-x for x in b] if flip else b).statistic)
    return found if found == found else None


def _turns(rows: Sequence[Row], measured: Measured) -> list[Turn]:
    turns = []
    for pair in combinations(rows, 2):
        smaller, larger = sorted(pair, key=lambda row: _known(row, "error"))
        gain = _known(larger, "psnr") - _known(smaller, "psnr")
        if not gain > 0:
            continue
        shared = [
            float(record["psnr"]) - float(measured.courses[smaller.name, i]["psnr"])
            for (who, i), record in measured.courses.items()
            if who == larger.name and (smaller.name, i) in measured.courses
        ]
        turned = (key for key in CHAIN[1:-1] if _known(smaller, key) > _known(larger, key))
        turns.append(
            Turn(
                smaller.name,
                larger.name,
                LINKS[next(turned, "psnr")],
                len(shared),
                sum(x > 0 for x in shared),
                gain,
            )
        )
    return sorted(turns, key=lambda turn: -turn.psnr)
