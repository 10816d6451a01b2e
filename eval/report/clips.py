"""Clips side by side: what the players show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dit_accel.eval.figures import Summary
from dit_accel.eval.report.pictures import poster
from dit_accel.eval.report.text import with_unit
from dit_accel.eval.samples import Key, Run, Sample
from dit_accel.eval.store import Store


def players(
    store: Store,
    run: Run,
    samples: Sequence[Sample],
    summary: Summary,
    clips: int,
    numbers: dict[str, int],
) -> dict[str, Any]:
    """What the players show: prompts, and the clips of every variant."""
    by_key = {sample.key: sample for sample in samples}
    wanted = [
        (prompt, seed + prompt.number)
        for prompt in run.settings.prompts
        for seed in run.settings.seeds
        if any(
            Key(v.slug, prompt.number, seed + prompt.number) in by_key
            for v in run.settings.variants
        )
    ]
    if len(wanted) > clips:
        wanted = [wanted[(2 * i + 1) * len(wanted) // (2 * clips)] for i in range(clips)]
    rows = []
    for prompt, seed in wanted:
        shown = []
        for variant in run.settings.variants:
            sample = by_key.get(Key(variant.slug, prompt.number, seed))
            if sample is None:
                continue
            each = summary.variant(variant.slug).each
            frames = store.frames(sample.key)
            shown.append(
                {
                    "variant": variant.slug,
                    "role": variant.role,
                    "colour": numbers.get(variant.method),
                    "file": store.media(sample.key).relative_to(store.root).as_posix(),
                    "poster": poster(frames[len(frames) // 2]),
                    "notes": _notes(sample, each, summary),
                }
            )
        rows.append({"text": prompt.text, "seed": seed, "clips": shown})
    return {
        "fps": run.settings.fps,
        "frames": run.settings.frames,
        "ratio": run.settings.width / run.settings.height,
        "prompts": rows,
        "left_out": len(run.settings.prompts) * len(run.settings.seeds) - len(rows),
    }


def _notes(sample: Sample, each: dict[str, dict[str, float]], summary: Summary) -> list[str]:
    """What is told under a clip."""
    found = []
    for name in ("psnr", "speedup"):
        value = each.get(name, {}).get(sample.key.name)
        if value is not None and sample.variant != "dense":
            measure = summary.measures[name]
            found.append(with_unit(value, measure))
    if sample.variant == "dense":
        return [*found, f"{sample.seconds.denoise:.2f} s"]
    return [*found, f"density {sample.density.total:.3f}"]
