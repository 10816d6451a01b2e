"""From what was asked on a command line or in YAML to the settings of a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dit_accel import presets
from dit_accel.errors import InputError
from dit_accel.eval.prompts import prompts_of
from dit_accel.eval.samples import DENSE, Settings, Variant
from dit_accel.options import plain
from dit_accel.pipelines import embedded
from dit_accel.pipelines.request import Request, effective

FLOORS = ("_native_math", "_native_efficient", "_native_flash", "_native_cudnn")
"""Attention backends of diffusers that torch brings, for dense against dense."""
_SAMPLE_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Entry:
    """One method of the list that was asked for.

    Attributes:
        method: the preset.
        name: of the variants made of it.
        options: given for this entry alone.
    """

    method: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def entries_of(given: str | Sequence[str | Mapping[str, Any]]) -> list[Entry]:
    """Entries from ``"pisa,psa"``, or from a list of names and mappings as YAML has it.

    A mapping is ``{method: pisa, name: pisa-raster, layout: raster}``; ``name`` may be left out.

    Raises:
        InputError: an entry is neither, or names no method.
    """
    listed = given.split(",") if isinstance(given, str) else given
    found = []
    for one in listed:
        if isinstance(one, str):
            found.append(Entry(one.strip(), one.strip()))
            continue
        if not isinstance(one, Mapping) or "method" not in one:
            raise InputError(f"methods: expected a name or a mapping with a method, got {one!r}")
        rest = {str(k): v for k, v in one.items() if k not in ("method", "name")}
        found.append(Entry(str(one["method"]), str(one.get("name", one["method"])), rest))
    for entry in found:
        presets.get(entry.method)
        _check_name(entry.name)
    return found


def _check_name(name: str) -> None:
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isalnum() and plain.isascii()) or name.startswith("."):
        raise InputError(
            f"methods: expected names of letters, digits and -_. that begin with none of these, "
            f"got {name!r}"
        )


def variants_of(
    entries: Sequence[Entry],
    densities: Sequence[float],
    shared: Mapping[str, Mapping[str, Any]],
    model: str,
    floor: str | None,
) -> tuple[Variant, ...]:
    """Every variant of a run: dense, the noise floor, and each method at each density.

    Args:
        entries: what was asked for; ``dense`` is there in any case.
        densities: for methods that have such an option, and are not given one; the others, such as
            ``psa``, are run once, as their options say.
        shared: options by method, for every entry of it.
        model: that suggests options, if it is an embedded one.
        floor: attention backend of diffusers for dense against dense; ``None`` leaves it out.

    Raises:
        InputError: a name comes twice, or an option does not fit.
    """
    for method in shared:
        if method not in {entry.method for entry in entries}:
            raise InputError(
                f"set: expected options of {', '.join(e.method for e in entries)}, got {method!r}"
            )
    found = [Variant(DENSE, DENSE, "dense")]
    if floor is not None:
        if floor not in FLOORS:
            raise InputError(f"floor: expected none | {' | '.join(FLOORS)}, got {floor!r}")
        slug = f"dense-{floor.strip('_').removeprefix('native_')}"
        found.append(Variant(slug, DENSE, "floor", backend=floor))
    for entry in entries:
        if entry.method == DENSE and not entry.options:
            continue
        given = {**shared.get(entry.method, {}), **entry.options}
        takes = "density" in presets.get(entry.method).accepts(given)
        if not takes or "density" in given or not densities:
            found.append(_variant(entry.name, entry.method, given, model))
            continue
        for density in densities:
            slug = f"{entry.name}-{density:g}"
            found.append(_variant(slug, entry.method, {**given, "density": density}, model))
    slugs = [variant.slug for variant in found]
    for slug in slugs:
        if slugs.count(slug) > 1:
            raise InputError(f"methods: expected every variant once, got {slug!r} twice")
    return tuple(found)


def _variant(slug: str, method: str, given: Mapping[str, Any], model: str) -> Variant:
    full = options_for(model, method, given)
    options = presets.build(method, **full).to_config()["options"]
    # as they are after a trip through JSON, which other processes take
    return Variant(slug, method, "method", {k: plain(v) for k, v in full.items()}, options)


def options_for(model: str | None, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a preset that is to be measured: as given, and what an embedded model suggests.

    ``dense_below`` is 0 where it was not given, so that the method is measured even where a
    pipeline would take dense attention, which is faster there. A ``Method`` inside of another keeps
    its own schedule.
    """
    full = embedded.options_for(model, method, given)
    if "dense_below" in presets.get(method).accepts(full) and not isinstance(
        full.get("inner"), Mapping
    ):
        full.setdefault("dense_below", 0)
    return full


def floor_for(device: str, dtype: str) -> str:
    """Another attention backend than torch would choose: what dense is held against by default."""
    if device == "cpu" or dtype == "float32":
        return "_native_math"
    return "_native_efficient"


def fingerprint(model: str) -> str | None:
    """Of a model's files: their names and sizes, and the first and last bytes of each.

    ``None`` for a model of a hub, which is known by its name.
    """
    inside = embedded.find(model)
    root = inside.directory if inside else Path(model).expanduser()
    if not root.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES), os.SEEK_SET)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def settings_of(
    pipe: Any,
    *,
    model: str,
    variants: tuple[Variant, ...],
    prompts: str,
    limit: int | None,
    seeds: Sequence[int],
    request: Request,
    fps: int | None,
    latents: bool,
    warmup: int,
) -> Settings:
    """The settings of a run, with the model's own numbers where none were given.

    Args:
        pipe: the model, loaded.
        prompts, limit: see `prompts_of`.
        request: of the generation; its prompt and seed are not looked at.

    Raises:
        InputError: something does not fit.
    """
    listed = prompts_of(prompts, model, limit)
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds: expected one or more, each once, got {list(seeds)}")
    if warmup < 0:
        raise InputError(f"warmup: expected an integer, 0 or more, got {warmup}")
    for seed in (min(seeds), max(seeds) + len(listed)):
        full = effective(pipe, replace(request, prompt=listed[0].text, seed=seed))
    inside = embedded.find(model)
    assert full.steps is not None
    assert full.guidance is not None
    assert full.height is not None
    assert full.width is not None
    assert full.frames is not None
    return Settings(
        model=model,
        fingerprint=fingerprint(model),
        variants=variants,
        prompts=listed,
        seeds=tuple(seeds),
        steps=full.steps,
        guidance=float(full.guidance),
        height=full.height,
        width=full.width,
        frames=full.frames,
        negative_prompt=full.negative_prompt,
        fps=fps or (inside.fps if inside else 16),
        dtype=str(pipe.transformer.dtype).removeprefix("torch."),
        device=str(pipe._execution_device.type),
        latents=latents,
        warmup=warmup,
    )
