"""What single samples come to: figures against dense and by themselves, and features.

Prompts are independent of each other here, so that several processes can share them.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_accel.eval import real
from dit_accel.eval.features.extractor import Extractor, extractor_of
from dit_accel.eval.metrics import fidelity, semantic, speed, vbench
from dit_accel.eval.samples import DENSE, Key, Sample
from dit_accel.eval.store import Store
from dit_accel.pipelines import embedded

Progress = Callable[[int, int], None]
_WORTH = 50
"""Samples that take as long to look at as a process takes to start."""
Features = NDArray[np.float32]
"""``[n, D]``, of a clip; not a tensor, which processes would hand over as open files."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What the figures are made with, beside the samples.

    Attributes:
        features: the feature network; see `dit_accel.eval.features.extractor.extractor_of`.
        real: a folder of real clips or images; ``None`` draws procedural ones for an embedded
            model, and leaves FID and KID to real clips out for others.
    """

    features: str = "auto"
    real: Path | None = None


@dataclass(slots=True)
class Notes:
    """Values of one variant.

    Attributes:
        each: by measure and sample.
        absent: reasons why there are none, by measure.
        frames: of measures that frames have, a row for every clip.
        features: by sample.
    """

    each: dict[str, dict[Key, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    frames: dict[str, list[list[float]]] = field(default_factory=dict)
    features: dict[Key, Features] = field(default_factory=dict)

    def add(self, name: str, key: Key, value: float) -> None:
        """A value of a sample."""
        self.each.setdefault(name, {})[key] = value

    def add_frames(self, name: str, key: Key, values: list[float]) -> None:
        """The mean over the frames, and each of them."""
        self.add(name, key, sum(values) / len(values))
        self.frames.setdefault(name, []).append(values)

    def lack(self, names: Iterable[str], reason: str) -> None:
        """Why measures have no value, unless that was told."""
        for name in names:
            self.absent.setdefault(name, reason)

    def take(self, other: Notes) -> None:
        """What was noted of other samples."""
        for name, values in other.each.items():
            self.each.setdefault(name, {}).update(values)
        for name, rows in other.frames.items():
            self.frames.setdefault(name, []).extend(rows)
        self.absent = {**other.absent, **self.absent}
        self.features.update(other.features)


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of samples.

    Attributes:
        notes: by variant.
        real: features of procedural clips of the same prompts, if they serve as the real ones.
    """

    notes: dict[str, Notes]
    real: list[Features]


class _Eye:
    """Looks at samples of a run, prompt by prompt; what it needs is loaded once."""

    def __init__(self, root: Path, choices: Choices) -> None:
        self._store = Store(root)
        self._settings = self._store.run().settings
        self._choices = choices
        self._extractor = extractor_of(choices.features, self._settings.model)
        self._lpips = fidelity.lpips()

    def look(self, keys: Sequence[Key]) -> Look:
        """At the samples of one prompt, dense before others of the same seed."""
        found = {variant.slug: Notes() for variant in self._settings.variants}
        dense: tuple[Key, Tensor, Tensor] | None = None
        for key in keys:
            frames, latents = self._store.frames(key), self._store.latents(key)["final"]
            notes = found[key.variant]
            if key.variant == DENSE:
                dense = key, frames, latents
            elif dense is not None and (dense[0].prompt, dense[0].seed) == (key.prompt, key.seed):
                _fidelity(notes, key, frames, latents, dense[1], dense[2], self._lpips)
            _alone(notes, key, frames, self._store.sample(key))
            if isinstance(self._extractor, Extractor):
                notes.features[key] = self._extractor.features(frames).numpy()
        return Look(found, self._real(keys[0].prompt))

    def _real(self, number: int) -> list[Features]:
        settings, extractor = self._settings, self._extractor
        drawn = self._choices.real is None and embedded.find(settings.model) is not None
        if not drawn or not isinstance(extractor, Extractor):
            return []
        clips = real.procedural(replace(settings, prompts=(settings.prompts[number],)))
        return [extractor.features(clip).numpy() for clip in clips]


def look(
    store: Store,
    choices: Choices,
    keys: Sequence[Key],
    progress: Progress | None = None,
    jobs: int = 1,
) -> Look:
    """Look at samples.

    Args:
        store: of the run.
        choices: see there.
        keys: of the samples, prompt by prompt, dense before others of the same seed.
        progress: called with how many were looked at, and of how many.
        jobs: processes that share the prompts; fewer are started where there is little to do.
    """
    settings = store.run().settings
    groups: dict[int, list[Key]] = {}
    for key in keys:
        groups.setdefault(key.prompt, []).append(key)
    whole = Look({variant.slug: Notes() for variant in settings.variants}, [])
    done = 0
    jobs = min(jobs, len(groups), -(-len(keys) // _WORTH))
    for group, seen in _seen(store, choices, list(groups.values()), jobs):
        for slug, notes in seen.notes.items():
            whole.notes[slug].take(notes)
        whole.real.extend(seen.real)
        done += len(group)
        if progress is not None:
            progress(done, len(keys))
    return whole


def _seen(
    store: Store, choices: Choices, groups: list[list[Key]], jobs: int
) -> Iterable[tuple[list[Key], Look]]:
    if jobs <= 1:
        eye = _Eye(store.root, choices)
        for group in groups:
            yield group, eye.look(group)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    with concurrent.futures.ProcessPoolExecutor(
        jobs,
        multiprocessing.get_context("spawn"),
        initializer=_open,
        initargs=(store.root, choices, threads),
    ) as pool:
        yield from zip(groups, pool.map(_look, groups), strict=True)


_eye: list[_Eye] = []


def _open(root: Path, choices: Choices, threads: int) -> None:
    torch.set_num_threads(threads)
    _eye.append(_Eye(root, choices))


def _look(group: list[Key]) -> Look:
    return _eye[0].look(group)


def _fidelity(
    notes: Notes,
    key: Key,
    frames: Tensor,
    latents: Tensor,
    dense_frames: Tensor,
    dense_latents: Tensor,
    lpips: Callable[[Tensor, Tensor], list[float]] | str,
) -> None:
    each = fidelity.psnr_by_frame(frames, dense_frames)
    notes.add_frames("psnr", key, each)
    # of all frames together, as it is told elsewhere
    notes.add("psnr", key, fidelity.psnr(frames, dense_frames))
    notes.add("psnr_worst_frame", key, min(each))
    notes.add_frames("ssim", key, fidelity.ssim_by_frame(frames, dense_frames))
    notes.add("latent_error", key, fidelity.latent_error(latents, dense_latents))
    if isinstance(lpips, str):
        notes.lack(("lpips",), lpips)
    else:
        notes.add_frames("lpips", key, lpips(frames, dense_frames))


def _alone(notes: Notes, key: Key, frames: Tensor, sample: Sample) -> None:
    """What a sample comes to without any other."""
    found, absent = speed.of_sample(sample)
    for name, value in found.items():
        notes.add(name, key, value)
    for name, reason in absent.items():
        notes.lack((name,), reason)
    if len(frames) > 1:
        notes.add("temporal_flickering", key, vbench.temporal_flickering(frames))
    else:
        notes.lack(vbench.DIMENSIONS, "it needs clips, and these are images")
    judged = semantic.judge(frames, sample.text)
    if isinstance(judged, str):
        notes.lack(semantic.NAMES, judged)
    else:
        for name, value in judged.items():
            notes.add(name, key, value)
