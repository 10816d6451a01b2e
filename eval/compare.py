"""Two runs side by side: what changed, beyond noise.

Variants are paired by name, and samples by prompt and seed. Of each measure that single samples
have, the mean difference is tested by exchanging signs, over prompts, and false discoveries among
all tests are kept below 5% (Benjamini and Hochberg 1995). A distribution has no single samples:
there the intervals must lie apart. Times that were taken on a device that processes shared tell of
the others as well, and are not judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from rich.table import Table

from dit_accel.errors import InputError
from dit_accel.eval import export
from dit_accel.eval.figures import Figure, Measure, Summary, VariantSummary
from dit_accel.eval.metrics import bootstrap
from dit_accel.eval.samples import Key, Run
from dit_accel.eval.store import Store, differences
from dit_accel.eval.summary import by_prompt, mean_of, summarise

ERROR_RATE: Final = 0.05
FEWEST: Final = 6
"""Of fewer prompts no exchange of signs is rare enough."""
Verdict = Literal["better", "worse", "changed", "same", "too few", "busy"]


@dataclass(frozen=True, slots=True)
class Change:
    """One measure of one variant in both runs.

    Attributes:
        variant, measure: what.
        before, after: means of the two runs over the prompts that both have; of a distribution the
            figures of all samples.
        difference: mean of after less before over the shared prompts; of a distribution, of the
            values. ``None`` where it is not a number.
        low, high: 95% interval of the difference.
        p, q: of the test, and adjusted for all tests; ``None`` for a distribution, and where no
            prompt differs.
        count: shared prompts.
        verdict: ``better`` and ``worse`` by the measure's sense, ``changed`` where it has none,
            ``same`` if nothing is beyond noise, ``busy`` for times of a device that was shared.
    """

    variant: str
    measure: str
    before: Figure
    after: Figure
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    q: float | None
    count: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that two runs have in common, and what they have not.

    Attributes:
        before, after: the folders.
        settings: in which they differ, in words.
        changes: by variant and measure.
        only_before, only_after: variants that only one of them has.
        notes: what to keep in mind.
    """

    before: str
    after: str
    settings: tuple[str, ...]
    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    notes: tuple[str, ...]


def compare(before: Path | str, after: Path | str) -> Comparison:
    """Compare two runs.

    Raises:
        InputError: one of them is no run, or they share no variant or no prompt.
    """
    stores = Store(before), Store(after)
    old, new = (store.run() for store in stores)
    shared = _shared(old, new)
    first, second = (_summary(store) for store in stores)
    names = [v.slug for v in first.variants if v.slug in {w.slug for w in second.variants}]
    if not names or not shared:
        what = "prompt and seed" if names else "variant"
        raise InputError(f"compare: expected runs that share a {what}, got none in common")
    changes = [
        change
        for name in names
        for change in _changes(first.variant(name), second.variant(name), first.measures, shared)
    ]
    if max(first.sharing, second.sharing) > 1:
        changes = [_unjudged(change, first.measures[change.measure]) for change in changes]
    adjusted = tuple(_adjusted(changes, first.measures))
    return Comparison(
        str(before),
        str(after),
        tuple(differences(old, new)),
        adjusted,
        tuple(v.slug for v in first.variants if v.slug not in names),
        tuple(v.slug for v in second.variants if v.slug not in names),
        (*_power(adjusted), *_notes(old, new, stores, (first, second))),
    )


def _power(changes: Iterable[Change]) -> Iterable[str]:
    """Whether so few prompts can tell a change at all, among so many tests."""
    tested = [change.count for change in changes if change.p is not None]
    if not tested:
        return
    count, least = min(tested), ERROR_RATE / len(tested)
    rarest = bootstrap.rarest_sign_flip_p(count)
    if rarest >= least:
        alone = math.floor(math.log2(2 / least)) + 1
        yield (
            f"{count} shared prompts are few for {len(tested)} tests: a change on every prompt is "
            f"told if {math.ceil(rarest / least)} figures have one, and {alone} prompts would "
            "tell a single one."
        )


def _summary(store: Store) -> Summary:
    """As it was written, if every sample was there; otherwise made anew."""
    if (store.root / "summary.json").is_file():
        kept = export.read(store.root)
        if kept.complete:
            return kept
    return summarise(store)


def _shared(old: Run, new: Run) -> dict[str, int]:
    """Samples that both runs make of the same prompt and seed: names, and the prompt's number."""
    texts = {prompt.number: prompt.text for prompt in old.settings.prompts}
    same = {p.number for p in new.settings.prompts if texts.get(p.number) == p.text}
    mine = {key.name for key in old.settings.every_key()}
    return {
        key.name: key.prompt
        for key in new.settings.every_key()
        if key.prompt in same and key.name in mine
    }


def _changes(
    old: VariantSummary,
    new: VariantSummary,
    measures: Mapping[str, Measure],
    shared: Mapping[str, int],
) -> Iterable[Change]:
    for name in measures:
        if name not in old.figures or name not in new.figures:
            continue
        before, after = old.figures[name], new.figures[name]
        if name not in old.each or name not in new.each:
            yield _of_distribution(old.slug, measures[name], before, after)
            continue
        pairs = {
            sample: (value, new.each[name][sample])
            for sample, value in old.each[name].items()
            if sample in shared and sample in new.each[name]
        }
        if pairs:
            yield _of_pairs(old.slug, name, pairs, shared)


def _of_pairs(
    slug: str,
    name: str,
    pairs: Mapping[str, tuple[float, float]],
    shared: Mapping[str, int],
) -> Change:
    each = list(enumerate(pairs.items()))
    before, after = (
        # means of shared samples alone, so that they differ by what is told
        mean_of({Key(slug, shared[at], i): pair[side] for i, (at, pair) in each})
        for side in range(2)
    )
    apart = {
        # equal infinities, of clips that are dense in both runs, do not differ
        Key(slug, shared[sample], i): 0.0 if a == b else b - a
        for i, (sample, (a, b)) in each
    }
    means = list(by_prompt(apart).values())
    mean = sum(means) / len(means)
    if not all(map(math.isfinite, means)) or len(means) < FEWEST:
        told = mean if math.isfinite(mean) else None
        return Change(
            slug, name, before, after, told, None, None, None, None, len(means), "too few"
        )
    if not any(means):  # nothing to test
        return Change(slug, name, before, after, 0.0, 0.0, 0.0, None, None, len(means), "same")
    low, high = bootstrap.interval(means) or (None, None)
    p = bootstrap.sign_flip_p(means)
    return Change(slug, name, before, after, mean, low, high, p, None, len(means), "same")


def _unjudged(change: Change, measure: Measure) -> Change:
    """Times of a device that was shared are shown, and not tested."""
    if measure.unit not in ("s", "×") or change.verdict == "too few":
        return change
    return replace(change, p=None, verdict="busy")


def _of_distribution(slug: str, measure: Measure, before: Figure, after: Figure) -> Change:
    bounds = before.low, before.high, after.low, after.high
    verdict: Verdict = "too few"
    if None not in bounds:
        assert before.low is not None
        assert before.high is not None
        assert after.low is not None
        assert after.high is not None
        apart = before.high < after.low or after.high < before.low
        verdict = _sense(measure, after.value - before.value) if apart else "same"
    count = min(before.count, after.count)
    difference = after.value - before.value
    return Change(
        slug, measure.name, before, after, difference, None, None, None, None, count, verdict
    )


def _sense(measure: Measure, difference: float) -> Verdict:
    if measure.better is None:
        return "changed"
    return "better" if (difference > 0) == (measure.better == "higher") else "worse"


def _adjusted(changes: list[Change], measures: Mapping[str, Measure]) -> list[Change]:
    """Verdicts, with p-values adjusted for all tests."""
    tested = sorted((c.p, i) for i, c in enumerate(changes) if c.p is not None)
    adjusted: dict[int, float] = {}
    least = 1.0
    for rank in range(len(tested), 0, -1):
        p, i = tested[rank - 1]
        least = min(least, p * len(tested) / rank)
        adjusted[i] = least
    found = []
    for i, change in enumerate(changes):
        if i not in adjusted:
            found.append(change)
            continue
        assert change.difference is not None
        beyond = adjusted[i] < ERROR_RATE and change.difference != 0
        verdict = _sense(measures[change.measure], change.difference) if beyond else "same"
        found.append(replace(change, q=adjusted[i], verdict=verdict))
    return found


def _notes(
    old: Run, new: Run, stores: Iterable[Store], summaries: Iterable[Summary]
) -> tuple[str, ...]:
    told = []
    sharing = max(summary.sharing for summary in summaries)
    if sharing > 1:
        told.append(
            f"Up to {sharing} processes shared a device: times and speed-ups are not judged."
        )
    elif old.machine != new.machine:
        told.append("The machines differ: compare ratios to dense, not seconds.")
    else:
        told.append(
            "Seconds also tell what else the machine did; ratios to dense are of one run each."
        )
    for store in stores:
        missing = len(store.run().settings.every_key()) - len(store.finished())
        if missing:
            told.append(f"{store.root} is not complete: {missing} samples are missing.")
    return tuple(told)


def table(comparison: Comparison, measures: Mapping[str, Measure], *, every: bool = False) -> Table:
    """What changed, a row a variant and measure; ``every`` shows the rest as well."""
    made = Table(title=f"{comparison.before} -> {comparison.after}; with 95% intervals")
    for heading in ("variant", "measure", "before", "after", "difference", "n", "q", ""):
        made.add_column(
            heading, justify="left" if heading in ("variant", "measure", "") else "right"
        )
    for change in comparison.changes:
        if not every and change.verdict in ("same", "too few", "busy"):
            continue
        measure = measures[change.measure]
        difference: Any = "n/a"
        if change.difference is not None:
            difference = export.told(Figure(change.difference, change.low, change.high, 0), "+.3g")
        made.add_row(
            change.variant,
            measure.title + (f" ({measure.unit})" if measure.unit else ""),
            export.told(replace(change.before, low=None, high=None), ".4g"),
            export.told(replace(change.after, low=None, high=None), ".4g"),
            difference,
            str(change.count),
            "" if change.q is None else f"{change.q:.3g}",
            change.verdict,
        )
    return made
