"""A run on disk: what was asked, every sample that was finished, and what was made of them.

::

    runs/first/
        run.json                         settings, prompts, variants, versions, machine
        samples/<variant>/<0000-seed>/   one finished sample, whole or not there at all
            sample.json                  `Sample`: what it was made from, and what was measured
            clip.mp4 | image.png         to look at
            frames.safetensors           ``frames``: uint8 [T, 3, H, W], for the metrics
            latents.safetensors          ``final``: fp32, and ``steps``: fp16, if asked for
        failures/<variant>/<0000-seed>.json   `Failure`: gone once the sample is there
        summary.json, summary.csv        computed from the samples; see `dit_accel.eval.summary`
        vbench/<variant>_eval_results.json    the same figures in VBench's layout

A sample is written under a temporary name on the same disk, and moved as one folder. Any process
may therefore be killed at any moment; what `Store.finished` lists is whole.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.eval import records
from dit_accel.eval.samples import SCHEMA, Failure, Key, Run, Sample, Settings, Variant
from dit_accel.pipelines import media

T = TypeVar("T")
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


class Store:
    """A run's folder. Reading never changes it.

    Args:
        root: the folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    # -- the run --------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether there is a run."""
        return (self.root / "run.json").is_file()

    def run(self) -> Run:
        """The run that lies here.

        Raises:
            InputError: there is none, or of another version of the format.
        """
        path = self.root / "run.json"
        if not path.is_file():
            raise InputError(f"run: expected a folder with a run.json, got {str(self.root)!r}")
        return parse(Run, path)

    def claim(self, settings: Settings, command: tuple[str, ...] = ()) -> Run:
        """Begin a run here, or take up the one that is here.

        Also removes what killed processes left half written.

        Raises:
            InputError: the folder holds something else, or a run with other settings, versions or
                devices.
        """
        versions, machine = records.versions(), records.machine()
        if self.exists():
            known = self.run()
            _same(self.root, known, Run(settings, command, 0, versions, machine))
        else:
            if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
                raise InputError(
                    "out: expected a new or empty folder, or one with a run, got "
                    f"{str(self.root)!r}"
                )
            self.root.mkdir(parents=True, exist_ok=True)
            known = Run(settings, command, time.time(), versions, machine)
            media.write_text(self.root / "run.json", records.dumps(known))
        shutil.rmtree(self._rooms, ignore_errors=True)
        return known

    # -- samples --------------------------------------------------------------------------------

    def folder(self, key: Key) -> Path:
        """Where a sample lies, or will."""
        return self.root / "samples" / key.variant / key.name

    def finished(self) -> set[Key]:
        """Names of all samples that are there."""
        found = set()
        for path in self.root.glob("samples/[!.]*/*/sample.json"):
            prompt, _, seed = path.parent.name.partition("-")
            with contextlib.suppress(ValueError):
                found.add(Key(path.parent.parent.name, int(prompt), int(seed)))
        return found

    def sample(self, key: Key) -> Sample:
        """What was measured of a sample.

        Raises:
            InputError: it is not there.
        """
        return parse(Sample, self.folder(key) / "sample.json")

    def samples(self, variant: str | None = None) -> list[Sample]:
        """All samples that are there, of one variant if it is named, by prompt and seed."""
        keys = [key for key in self.finished() if variant in (None, key.variant)]
        return [self.sample(key) for key in sorted(keys)]

    def media(self, key: Key) -> Path:
        """The file to look at."""
        return self.folder(key) / self.sample(key).media

    def frames(self, key: Key) -> Tensor:
        """fp32 ``[T, 3, H, W]`` in [0, 1]: the 8-bit frames as shown."""
        return _tensors(self.folder(key) / "frames.safetensors")["frames"].float() / 255

    def latents(self, key: Key) -> dict[str, Tensor]:
        """``final``, fp32, and ``steps`` ``[S, …]``, fp16, where they were kept."""
        return _tensors(self.folder(key) / "latents.safetensors")

    def put(
        self, sample: Sample, frames: Tensor, latents: Tensor, fps: int, steps: Tensor | None = None
    ) -> Path:
        """Write a finished sample, whole or not at all; one that is there already stays.

        Args:
            sample: what was measured; ``media`` and ``shape`` are filled in here.
            frames: ``[T, 3, H, W]`` in [0, 1]; one frame makes an image, more a clip.
            latents: the final ones.
            fps: frames per second of the clip.
            steps: latents after every step, ``[S, …]``.

        Returns:
            The sample's folder.
        """
        target = self.folder(sample.key)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._rooms.mkdir(parents=True, exist_ok=True)
        pixels = (frames.clamp(0, 1) * 255).round().byte().cpu().contiguous()
        count, channels, height, width = pixels.shape
        name = "image.png" if count == 1 else "clip.mp4"
        sample = replace(sample, media=name, shape=(count, channels, height, width))
        with tempfile.TemporaryDirectory(dir=self._rooms) as room:
            part = Path(room) / "sample"
            part.mkdir()
            if count == 1:
                media.write_image(frames[:1], part / name)
            else:
                media.write_clip(frames, part / name, fps)
            save_file({"frames": pixels}, part / "frames.safetensors")
            kept = {"final": latents.float().cpu().contiguous()}
            if steps is not None:
                kept["steps"] = steps.half().cpu().contiguous()
            save_file(kept, part / "latents.safetensors")
            (part / "sample.json").write_text(records.dumps(sample), encoding="utf-8")
            # another process may have been first; what it wrote is as good
            with contextlib.suppress(OSError):
                part.rename(target)
        if not target.is_dir():
            raise OSError(f"{target}: could not be written")
        self._failure(sample.key).unlink(missing_ok=True)
        return target

    # -- failures -------------------------------------------------------------------------------

    def fail(self, failure: Failure) -> None:
        """Note why a sample is not there."""
        path = self._failure(failure.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        media.write_text(path, records.dumps(failure))

    def failures(self) -> list[Failure]:
        """Samples that were tried and are not there, with the reasons."""
        found = [parse(Failure, path) for path in sorted(self.root.glob("failures/*/*.json"))]
        there = self.finished()
        return [failure for failure in found if failure.key not in there]

    def _failure(self, key: Key) -> Path:
        return self.root / "failures" / key.variant / f"{key.name}.json"

    @property
    def _rooms(self) -> Path:
        # beside the samples, so that moving one is a rename
        return self.root / "samples" / ".parts"


def parse(kind: type[T], path: Path) -> T:
    """One of the format's files.

    Raises:
        InputError: it is not there, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"run: expected {str(path)!r}, got {error.strerror}") from None
    try:
        # made once: it costs more than reading a file
        adapter = _ADAPTERS.setdefault(kind, _ADAPTERS.get(kind) or TypeAdapter(kind))
        made: T = adapter.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"run: expected a {kind.__name__} of format {SCHEMA} in {str(path)!r}, got "
            f"{where or 'text'}: {first['msg']}"
        ) from None
    if isinstance(made, Run) and made.schema != SCHEMA:
        raise InputError(f"run: expected format {SCHEMA} in {str(path)!r}, got {made.schema}")
    return made


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"run: expected tensors in {str(path)!r}, got: {error}") from None
    return found


def _same(root: Path, known: Run, mine: Run) -> None:
    """Raise an InputError unless two runs may be mixed."""
    changed = list(differences(known, mine))
    if changed:
        raise InputError(
            f"{root}: expected the settings of the run that lies there, or another folder, got "
            + "; ".join(changed)
        )


def differences(known: Run, mine: Run) -> Iterator[str]:
    """In which settings, versions and devices two runs differ, in words."""
    for entry in fields(Settings):
        theirs, ours = getattr(known.settings, entry.name), getattr(mine.settings, entry.name)
        # as they are after a trip through JSON
        if records.dumps(theirs) == records.dumps(ours):
            continue
        if entry.name == "variants":
            yield from _told_variants(theirs, ours)
        else:
            yield _told(entry.name, theirs, ours)
    for name in ("dit_accel", "torch", "diffusers"):
        if known.versions.get(name) != mine.versions.get(name):
            yield _told(f"version of {name}", known.versions.get(name), mine.versions.get(name))
    gpu = known.settings.device != "cpu"
    for name in ("gpus",) if gpu else ("processor", "cpus"):
        theirs, ours = known.machine.get(name), mine.machine.get(name)
        if set(theirs) != set(ours) if gpu and theirs and ours else theirs != ours:
            yield _told(f"machine's {name}", theirs, ours)


def _told(name: str, theirs: Any, ours: Any) -> str:
    if name == "prompts":
        same = [item.text for item in theirs] == [item.text for item in ours]
        told = f"{len(theirs)} -> {len(ours)}" if len(theirs) != len(ours) else "other ones"
        return f"prompts: {'other details of the same texts' if same else told}"
    return f"{name} {theirs} -> {ours}"


def _told_variants(theirs: Sequence[Variant], ours: Sequence[Variant]) -> Iterator[str]:
    """Which are gone and new, and what has changed of the others; what several share, once."""
    old, new = ({one.slug: one for one in listed} for listed in (theirs, ours))
    for word, names in (("without", old.keys() - new.keys()), ("with", new.keys() - old.keys())):
        if names:
            yield f"{word} {', '.join(sorted(names))}"
    shared = [slug for slug in old if slug in new]
    if shared != [slug for slug in new if slug in old]:
        yield "variants in another order"
    changed: dict[str, list[str]] = {}
    for slug in shared:
        before, after = (_plain(one[slug]) for one in (old, new))
        told = [
            f"{name} {before.get(name)} -> {after.get(name)}"
            for name in dict.fromkeys([*before, *after])
            if before.get(name) != after.get(name)
        ]
        if told:
            changed.setdefault(", ".join(told), []).append(slug)
    yield from (f"{', '.join(slugs)}: {told}" for told, slugs in changed.items())


def _plain(variant: Variant) -> dict[str, Any]:
    """What a variant is made of, one level deep; an option that was given stands for itself."""
    made = {"method": variant.method, "role": variant.role, "backend": variant.backend}
    # as they are after a trip through JSON
    options = json.loads(records.dumps({**variant.options, **variant.given}))
    return {**made, **options}


def stack_steps(steps: Sequence[Tensor]) -> Tensor | None:
    """Latents of every step as one tensor ``[S, …]``; ``None`` where none were kept."""
    return torch.stack(tuple(steps)) if steps else None
