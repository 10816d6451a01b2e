"""Time, memory and operations of samples."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from dit_accel.eval.samples import PARTS, Key, Sample

MIB = 2**20
TERA = 1e12


def of_sample(sample: Sample) -> tuple[dict[str, float], dict[str, str]]:
    """What a sample says by itself, by the measure's name, and what it does not, with the reason.

    The median step leaves the first one out where there are more: on a GPU it can hold compilation
    and allocation that a warm-up of fewer steps did not meet.
    """
    steps = sample.seconds.steps
    found = {
        "density": sample.density.total,
        "seconds": sample.seconds.total,
        "step_seconds": median(steps[1:] if len(steps) > 1 else steps),
        "denoise_seconds": sample.seconds.denoise,
        "decode_seconds": sample.seconds.decode,
    }
    absent = {}
    if sample.attention_seconds:
        found["attention_seconds"] = sum(sample.attention_seconds.values())
    else:
        absent["attention_seconds"] = sample.absent.get("attention_seconds", "not recorded")
    if sample.peak_bytes is None:
        absent["peak_memory"] = sample.absent.get("peak_bytes", "not recorded")
    else:
        found["peak_memory"] = sample.peak_bytes / MIB
    if sample.flops is None:
        absent["flops"] = sample.absent.get("flops", "not recorded")
    else:
        found["flops"] = sample.flops.total / TERA
    return found, absent


def ratios(samples: Iterable[Sample], dense: dict[Key, Sample]) -> dict[str, dict[Key, float]]:
    """Dense time over a sample's own, by measure and sample: of denoising, and of attention.

    Args:
        samples: of one variant.
        dense: by the dense sample's name.
    """
    found: dict[str, dict[Key, float]] = {"speedup": {}, "attention_speedup": {}}
    for sample in samples:
        other = dense.get(Key("dense", sample.prompt, sample.seed))
        if other is None:
            continue
        found["speedup"][sample.key] = other.seconds.denoise / sample.seconds.denoise
        mine, theirs = (sum(s.attention_seconds.values()) for s in (sample, other))
        if mine and theirs:
            found["attention_speedup"][sample.key] = theirs / mine
    return {name: values for name, values in found.items() if values}


def medians(rows: Iterable[dict[int, float]]) -> dict[int, float]:
    """Median over the samples, by layer."""
    gathered: dict[int, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            gathered.setdefault(key, []).append(value)
    return {key: median(values) for key, values in sorted(gathered.items())}


def breakdown(samples: Iterable[Sample]) -> dict[str, float]:
    """Median seconds over the samples, by part; nothing where none was recorded."""
    recorded = [sample.breakdown for sample in samples if sample.breakdown]
    if not recorded:
        return {}
    return {part: median(row.get(part, 0.0) for row in recorded) for part in PARTS}


def mean_density(rows: Iterable[dict[int, float]]) -> dict[int, float]:
    """Mean over the samples, by step or by layer."""
    gathered: dict[int, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            gathered.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in sorted(gathered.items())}
