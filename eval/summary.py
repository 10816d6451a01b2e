"""From the samples of a run to its figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dit_accel.eval import real
from dit_accel.eval.features.extractor import Extractor, extractor_of
from dit_accel.eval.figures import MEASURES, Figure, Summary, VariantSummary
from dit_accel.eval.looks import Choices, Features, Look, Notes, Progress, look
from dit_accel.eval.metrics import bootstrap, distribution, semantic, speed, vbench
from dit_accel.eval.samples import DENSE, Key, Sample, Settings, Variant
from dit_accel.eval.store import Store
from dit_accel.pipelines import embedded

FIDELITY = ("psnr", "ssim", "lpips", "latent_error", "psnr_worst_frame")
_MEDIANS = {
    "speedup", "attention_speedup", "seconds", "step_seconds", "denoise_seconds",
    "decode_seconds", "attention_seconds",
}  # fmt: skip
_REFERENCE = "it is the reference itself"
_NO_SAMPLE = "there is no sample of it"
_NO_DENSE = "there is no dense sample beside it"


def summarise(
    store: Store,
    choices: Choices = Choices(),
    progress: Progress | None = None,
    jobs: int = 1,
) -> Summary:
    """The figures of the samples that are there.

    Args:
        store: of a run, finished or not.
        choices: see there.
        progress: called with how many samples have been looked at, and of how many.
        jobs: processes that share the prompts.

    Raises:
        InputError: there is no run, or a choice does not fit.
    """
    settings = store.run().settings
    extractor = extractor_of(choices.features, settings.model)
    there = store.finished()
    keys = [key for key in settings.every_key() if key in there]
    samples = {key: store.sample(key) for key in keys}
    seen = look(store, choices, keys, progress, jobs)
    noted = seen.notes
    references = {key: sample for key, sample in samples.items() if key.variant == DENSE}
    for slug, notes in noted.items():
        mine = [sample for key, sample in samples.items() if key.variant == slug]
        for name, values in speed.ratios(mine, references).items():
            for key, value in values.items():
                notes.add(name, key, value)
        notes.lack(("spatial_relation",), semantic.why_no_relation(settings.model))
        if slug == DENSE:
            notes.lack((*FIDELITY, "fid_dense", "kid_dense"), _REFERENCE)
    _weights(store, settings, noted, samples)
    distances = _distances(settings, choices, extractor, seen)
    failed = store.failures()
    variants = tuple(
        _variant(
            variant,
            noted[variant.slug],
            distances[variant.slug],
            [sample for key, sample in samples.items() if key.variant == variant.slug],
            sum(failure.variant == variant.slug for failure in failed),
        )
        for variant in settings.variants
    )
    sharing = max((sample.sharing for sample in samples.values()), default=1)
    return Summary(
        MEASURES,
        variants,
        complete=len(keys) == len(settings.every_key()),
        notes=_remarks(settings, choices, extractor, noted[DENSE].features, sharing),
        sharing=sharing,
    )


def _weights(
    store: Store, settings: Settings, noted: dict[str, Notes], samples: Mapping[Key, Sample]
) -> None:
    """VBench's dimensions that need weights."""
    reasons = vbench.reasons()
    runnable = [name for name in vbench.NEEDS_WEIGHTS if name not in reasons]
    for slug, notes in noted.items():
        for name, reason in reasons.items():
            notes.lack((name,), reason)
        paths = {
            str(store.folder(key) / sample.media): key
            for key, sample in samples.items()
            if key.variant == slug and sample.media.endswith(".mp4")
        }
        if not runnable or not paths:
            continue
        scores = vbench.by_package([Path(p) for p in paths], runnable, settings.device)
        for name, given in scores.items():
            if isinstance(given, str):
                notes.lack((name,), given)
                continue
            for path, value in given.items():
                notes.add(name, paths[path], value)


# -- distributions ---------------------------------------------------------------------------------


def _distances(
    settings: Settings, choices: Choices, extractor: Extractor | str, seen: Look
) -> dict[str, dict[str, Figure]]:
    """FID and KID of every variant, to real clips and to the dense ones."""
    noted = seen.notes
    found: dict[str, dict[str, Figure]] = {slug: {} for slug in noted}
    if isinstance(extractor, str):
        for notes in noted.values():
            notes.lack(("fid", "kid", "fid_dense", "kid_dense"), extractor)
        return found
    truth = _real(settings, choices, extractor, seen.real)
    references = _tensors(noted[DENSE].features)
    for slug, notes in noted.items():
        mine = _tensors(notes.features)
        if isinstance(truth, str):
            notes.lack(("fid", "kid"), truth)
        else:
            _distance(found[slug], notes, ("fid", "kid"), mine, truth)
        if slug == DENSE:
            continue
        pairs = {key: Key(DENSE, key.prompt, key.seed) for key in mine}
        both = {key: row for key, row in mine.items() if pairs[key] in references}
        dense = [references[pairs[key]] for key in both]
        _distance(found[slug], notes, ("fid_dense", "kid_dense"), both, dense, paired=True)
    return found


def _tensors(features: Mapping[Key, Features]) -> dict[Key, Tensor]:
    return {key: torch.from_numpy(rows) for key, rows in features.items()}


def _real(
    settings: Settings, choices: Choices, extractor: Extractor, drawn: list[Features]
) -> list[Tensor] | str:
    if choices.real is not None:
        return [extractor.features(clip) for clip in real.from_folder(choices.real, settings)]
    if embedded.find(settings.model) is None:
        return "no folder of real clips was given (--real)"
    if not drawn:
        return "no prompt is a caption of the embedded domain, so that no real clip can be drawn"
    return [torch.from_numpy(rows) for rows in drawn]


def _distance(
    figures: dict[str, Figure],
    notes: Notes,
    names: tuple[str, str],
    mine: Mapping[Key, Tensor],
    others: list[Tensor],
    paired: bool = False,
) -> None:
    """FID and KID of features to others; ``paired`` ones are left out together."""
    rows = list(mine.values())
    if sum(map(len, rows)) < 2 or sum(map(len, others)) < 2:
        notes.lack(names, "there are fewer than two samples")
        return
    groups: dict[int, list[int]] = {}
    for i, key in enumerate(mine):
        groups.setdefault(key.prompt, []).append(i)
    fixed = torch.cat(others)

    def both(kept: Iterable[int]) -> tuple[Tensor, Tensor]:
        chosen = list(kept)
        other = torch.cat([others[i] for i in chosen]) if paired else fixed
        return torch.cat([rows[i] for i in chosen]), other

    def fid(kept: Iterable[int]) -> float:
        return distribution.frechet(*both(kept))

    def kid(kept: Iterable[int]) -> float:
        return distribution.kernel_distance(*both(kept), paired=paired)

    for name, measure in zip(names, (fid, kid), strict=True):
        found = bootstrap.jackknife(list(groups.values()), measure)
        value, low, high = found or (measure(range(len(rows))), None, None)
        figures[name] = Figure(value, low, high, len(rows))


# -- figures ---------------------------------------------------------------------------------------


def _variant(
    variant: Variant,
    notes: Notes,
    distances: Mapping[str, Figure],
    samples: list[Sample],
    failed: int,
) -> VariantSummary:
    figures = {name: figure_of(name, values) for name, values in notes.each.items()} | dict(
        distances
    )
    absent = {
        name: _NO_SAMPLE
        if not samples
        else notes.absent.get(name, "there is no dense sample of it")
        for name in MEASURES
        if name not in figures
    }
    return VariantSummary(
        slug=variant.slug,
        method=variant.method,
        role=variant.role,
        options=variant.options,
        samples=len(samples),
        failed=failed,
        figures={name: figures[name] for name in MEASURES if name in figures},
        absent=absent,
        by_step=speed.mean_density(sample.density.by_step for sample in samples),
        by_layer=speed.mean_density(sample.density.by_layer for sample in samples),
        attention_seconds=speed.medians(sample.attention_seconds for sample in samples),
        breakdown=speed.breakdown(samples),
        each={
            name: {key.name: value for key, value in values.items()}
            for name, values in notes.each.items()
        },
        by_frame={
            name: tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
            for name, rows in notes.frames.items()
        },
    )


def by_prompt(values: Mapping[Key, float]) -> dict[int, float]:
    """Mean over the seeds of each prompt: prompts are independent, seeds of one are not."""
    groups: dict[int, list[float]] = {}
    for key, value in values.items():
        groups.setdefault(key.prompt, []).append(value)
    return {prompt: sum(group) / len(group) for prompt, group in sorted(groups.items())}


def figure_of(name: str, values: Mapping[Key, float]) -> Figure:
    """The figure that values of single samples make."""
    if name not in _MEDIANS and name != "peak_memory":
        return mean_of(values)
    means = list(by_prompt(values).values())
    if name == "peak_memory":
        return Figure(max(values.values()), None, None, len(means))
    low, high = bootstrap.interval(means, bootstrap.median) or (None, None)
    value = torch.tensor(means, dtype=torch.float64).quantile(0.5)
    return Figure(float(value), low, high, len(means))


def mean_of(values: Mapping[Key, float]) -> Figure:
    """The mean over prompts."""
    means = list(by_prompt(values).values())
    low, high = bootstrap.interval(means) or (None, None)
    return Figure(sum(means) / len(means), low, high, len(means))


def _remarks(
    settings: Settings,
    choices: Choices,
    extractor: Extractor | str,
    features: Mapping[Key, Features],
    sharing: int,
) -> tuple[str, ...]:
    told = [
        "Intervals are of 95%, over prompts (seeds of one prompt are averaged first): bootstrap "
        f"percentiles, and the jackknife for FID and KID; none of fewer than {bootstrap.FEWEST}.",
        "Frames are compared as shown, in 8 bits; latents in fp32.",
    ]
    if isinstance(extractor, Extractor):
        where = "procedural clips of the same prompts" if choices.real is None else choices.real
        told.append(
            f"FID and KID on the features of {extractor.name} (one for each {extractor.of}), "
            f"against {where}."
        )
        rows = list(features.values())
        count = sum(map(len, rows))
        if rows and count <= rows[0].shape[1]:
            told.append(f"FID is biased here: {count} samples for {rows[0].shape[1]} features.")
    if any(variant.role == "floor" for variant in settings.variants):
        told.append("Dense by another attention backend shows what rounding alone does.")
    if sharing > 1:
        told.append(
            f"Up to {sharing} processes shared a device: times and speed-ups are of a busy one, "
            "peaks of memory of one process."
        )
    return tuple(told)
