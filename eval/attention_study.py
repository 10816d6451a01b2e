"""Attention errors of many methods beside the fidelity of whole generations with them.

Everything is kept in one folder, as it comes: taken up again, finished pieces are skipped, and a
study of other settings is refused.

- ``captures/p000/``: attention calls of the dense generation of each prompt
- ``dense/p000.safetensors``: its course
- ``maps/``: of the first prompt, what became of every pair of blocks; one file a candidate
- ``calls.jsonl``: one line for a candidate, a source and a layer
- ``generations.jsonl``: one line for a candidate and a prompt
- ``settings.json``, ``summary.json``, ``summary.csv``
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as File
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dit_accel.errors import InputError
from dit_accel.eval import attention_maps, calls, fields, records
from dit_accel.eval.attention_errors import Replay, replay
from dit_accel.eval.candidates import Candidate
from dit_accel.eval.samples import Settings
from dit_accel.eval.trajectories import Course, Path, compare, follow, runner
from dit_accel.pipelines import accelerate, load, media, restore
from dit_accel.pipelines.request import Request, effective

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Study:
    """What to measure.

    Attributes:
        model: what `dit_accel.pipelines.load` takes.
        prompts: prompt ``i`` is generated from seed ``seed + i``.
        layers, at: layers and denoising steps whose calls are captured; see
            `dit_accel.eval.calls.chosen_layers` and `chosen_steps`.
        steps, guidance: of the generations; the model's own by default.
        seed: of the first prompt, and of the first synthetic field.
        height, width, frames, negative_prompt: of the generations; likewise.
        synthetic: how many synthetic fields.
        grid, heads, depth, synthetic_steps: of these.
        generate: also generate with every candidate.
        maps: also map what becomes of the pairs of blocks, at up to three of the steps.
        device, dtype: as in `dit_accel.pipelines.load`.
    """

    model: str
    prompts: tuple[str, ...]
    layers: str = "auto"
    at: str = "auto"
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    negative_prompt: str | None = None
    synthetic: int = 1
    grid: tuple[int, int, int] = (5, 16, 16)
    heads: int = 4
    depth: int = 64
    synthetic_steps: int = 4
    generate: bool = True
    maps: bool = True
    device: str = "cpu"
    dtype: torch.dtype | None = None

    def fixed(self) -> dict[str, Any]:
        """What a folder must agree with to be taken up; more may be measured in it."""
        told = asdict(self)
        for free in ("prompts", "synthetic", "generate", "maps"):
            del told[free]
        return json.loads(records.dumps(told))


def like_run(study: Study, settings: Settings, limit: int) -> Study:
    """A study that generates as an evaluation run did, its first prompts."""
    return replace(
        study,
        prompts=tuple(prompt.text for prompt in settings.prompts[:limit]),
        steps=settings.steps,
        guidance=settings.guidance,
        seed=settings.seeds[0],
        height=settings.height,
        width=settings.width,
        frames=settings.frames,
        negative_prompt=settings.negative_prompt,
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that a folder holds.

    Attributes:
        settings: of the study, with the candidates and the command.
        replays: by candidate, source (``captured:0`` or ``synthetic:0``) and layer.
        courses: by candidate and prompt.
    """

    settings: dict[str, Any]
    replays: Mapping[tuple[str, str, int], dict[str, Any]] = field(default_factory=dict)
    courses: Mapping[tuple[str, int], dict[str, Any]] = field(default_factory=dict)


def run(
    study: Study,
    chosen: Sequence[Candidate],
    folder: File,
    progress: Progress = lambda *told: None,
) -> Measured:
    """Measure what is not measured yet.

    Args:
        study: the settings.
        chosen: what is compared.
        folder: of the study; made if it is not there.
        progress: called with what is under way, how much of it is done, and of how much.

    Raises:
        InputError: the folder holds a study of other settings, or something does not fit.
    """
    if not chosen:
        raise InputError("methods: expected at least one method or combination, got none")
    folder.mkdir(parents=True, exist_ok=True)
    _settle(study, chosen, folder)
    sources: list[str] = []
    if study.prompts:
        sources += [f"captured:{i}" for i in range(len(study.prompts))]
        _run_model(study, chosen, folder, progress)
    for i in range(study.synthetic):
        sources.append(f"synthetic:{i}")
    _run_replays(study, chosen, folder, sources, progress)
    if study.maps and study.prompts:
        _run_maps(study, chosen, folder, progress)
    return read(folder)


def read(folder: File) -> Measured:
    """What a folder holds so far.

    Raises:
        InputError: it holds no study.
    """
    path = folder / "settings.json"
    if not path.is_file():
        raise InputError(
            f"attention: expected a folder of a study, got {str(folder)!r} without one"
        )
    return Measured(
        json.loads(path.read_text()),
        {(r["candidate"], r["source"], r["layer"]): r for r in _lines(folder / "calls.jsonl")},
        {(r["candidate"], r["prompt"]): r for r in _lines(folder / "generations.jsonl")},
    )


def _settle(study: Study, chosen: Sequence[Candidate], folder: File) -> None:
    """Write the settings, unless others are there."""
    path, fixed = folder / "settings.json", study.fixed()
    listed = {made.name: _told(made) for made in chosen}
    prompts = list(study.prompts)
    if path.is_file():
        known = json.loads(path.read_text())
        for name, value in fixed.items():
            if known["study"].get(name) != value:
                raise InputError(
                    f"out: expected the settings that {str(folder)!r} was begun with, got {name} "
                    f"{value!r} where it has {known['study'].get(name)!r}"
                )
        both = min(len(prompts), len(known["prompts"]))
        if prompts[:both] != known["prompts"][:both]:
            raise InputError(
                f"out: expected the prompts that {str(folder)!r} was begun with, got others"
            )
        for name, told in listed.items():
            if known["candidates"].get(name, told) != told:
                raise InputError(
                    f"out: expected {name} as {str(folder)!r} was begun with, got other options"
                )
        listed = {**known["candidates"], **listed}
        prompts = max(prompts, known["prompts"], key=len)
    elif any(folder.iterdir()):
        raise InputError(f"out: expected an empty folder or one of a study, got {str(folder)!r}")
    told = records.signed({"study": fixed, "prompts": prompts, "candidates": listed})
    media.write_text(path, records.dumps(told))


def _told(made: Candidate) -> dict[str, Any]:
    layout, route, rest = made.parts
    told = {
        "kind": made.kind,
        "asked": made.asked,
        "layout": layout,
        "route": route,
        "rest": rest,
        "method": repr(made.method),
    }
    return json.loads(records.dumps(told))


def _run_model(study: Study, chosen: Sequence[Candidate], folder: File, progress: Progress) -> None:
    """Dense generations with their captures, and the candidates' own."""
    done = set(read(folder).courses)
    wanted = [
        (made, i)
        for i in range(len(study.prompts))
        for made in chosen
        if study.generate and (made.name, i) not in done
    ]
    dense_missing = [
        i
        for i in range(len(study.prompts))
        if not (folder / f"dense/p{i:03d}.safetensors").exists()
    ]
    if not wanted and not dense_missing:
        return
    pipe = load(study.model, device=study.device, dtype=study.dtype)
    pipe.set_progress_bar_config(disable=True)
    requests = [
        effective(
            pipe,
            Request(
                prompt,
                study.negative_prompt,
                study.height,
                study.width,
                study.frames,
                study.steps,
                study.guidance,
                study.seed + i,
            ),
        )
        for i, prompt in enumerate(study.prompts)
    ]
    for count, i in enumerate(dense_missing):
        progress("dense", count, len(dense_missing))
        _dense(study, pipe, requests[i], folder, i)
    if dense_missing:
        progress("dense", len(dense_missing), len(dense_missing))
    for count, (made, i) in enumerate(wanted):
        progress("generations", count, len(wanted))
        course = _generate(pipe, made, requests[i], _dense_path(folder, i))
        _append(
            folder / "generations.jsonl",
            {"candidate": made.name, "prompt": i, **course.to_dict()},
        )
    if wanted:
        progress("generations", len(wanted), len(wanted))


def _dense(study: Study, pipe: Any, request: Request, folder: File, number: int) -> None:
    room = folder / f"captures/p{number:03d}"
    room.mkdir(parents=True, exist_ok=True)
    (folder / "dense").mkdir(exist_ok=True)
    assert request.steps is not None
    layers = calls.chosen_layers(study.layers, calls.num_layers(pipe))
    steps = calls.chosen_steps(study.at, request.steps)
    path = follow(
        pipe,
        lambda see: calls.capture(pipe, request, room, layers=layers, steps=steps, on_latents=see),
    )
    tensors = {name: value.contiguous() for name, value in path.tensors().items()}
    media.replace_with(
        folder / f"dense/p{number:03d}.safetensors",
        lambda part: save_file(tensors, part, metadata={"guidance": str(request.guidance)}),
    )


def _dense_path(folder: File, number: int) -> Path:
    with safe_open(folder / f"dense/p{number:03d}.safetensors", framework="pt") as file:
        return Path.of({name: file.get_tensor(name) for name in file.keys()}, 1.0)  # noqa: SIM118


def _guidance(folder: File, number: int) -> float:
    with safe_open(folder / f"dense/p{number:03d}.safetensors", framework="pt") as file:
        return float(file.metadata()["guidance"])


def _generate(pipe: Any, made: Candidate, request: Request, dense: Path) -> Course:
    accelerate(pipe, made.method)
    try:
        free = follow(pipe, runner(pipe, request))
        forced = follow(pipe, runner(pipe, request), forced=dense.latents)
    finally:
        restore(pipe)
    assert request.guidance is not None
    return compare(dense, free, forced, request.guidance)


def _run_replays(
    study: Study,
    chosen: Sequence[Candidate],
    folder: File,
    sources: Sequence[str],
    progress: Progress,
) -> None:
    done = set(read(folder).replays)
    pieces: list[tuple[str, int]] = []
    for source in sources:
        kind, _, number = source.partition(":")
        if kind == "synthetic":
            pieces.append((source, 0))
        else:
            layers = calls.layers_in(folder / f"captures/p{int(number):03d}")
            pieces += [(source, layer) for layer in layers]
    wanted = [
        (source, layer, made)
        for source, layer in pieces
        for made in chosen
        if (made.name, source, layer) not in done
    ]
    for count, (source, layer, made) in enumerate(wanted):
        progress("attention", count, len(wanted))
        steps, guidance = _steps_of(study, folder, source, layer)
        result: Replay = replay(made.method, steps, guidance)
        _append(
            folder / "calls.jsonl",
            {"candidate": made.name, "source": source, "layer": layer, **result.to_dict()},
        )
    if wanted:
        progress("attention", len(wanted), len(wanted))


def _run_maps(study: Study, chosen: Sequence[Candidate], folder: File, progress: Progress) -> None:
    """Maps of the first prompt's calls: of every captured layer, at three steps or fewer."""
    room, target = folder / "captures/p000", folder / "maps"
    target.mkdir(exist_ok=True)
    wanted = [made for made in chosen if not attention_maps.file_of(target, made.name).exists()]
    layers, steps = calls.layers_in(room), calls.steps_in(room)
    some = {steps[round(i * (len(steps) - 1) / 2)] for i in range(3)}
    for count, made in enumerate(wanted):
        progress("maps", count, len(wanted))
        attention_maps.save(
            (
                one
                for layer in layers
                for one in attention_maps.maps(
                    made.name,
                    made.method,
                    calls.steps_of(room, layer, study.device),
                    some,
                )
            ),
            target,
        )
    if wanted:
        progress("maps", len(wanted), len(wanted))


def _steps_of(
    study: Study, folder: File, source: str, layer: int
) -> tuple[Iterator[list[calls.Call]], float]:
    """The calls of a source's layer, and the guidance they were made with."""
    kind, _, text = source.partition(":")
    number = int(text)
    if kind == "captured":
        room = folder / f"captures/p{number:03d}"
        return calls.steps_of(room, layer, study.device), _guidance(folder, number)
    made = fields.synthetic(
        study.grid,
        study.heads,
        study.depth,
        study.synthetic_steps,
        seed=study.seed + number,
        device=study.device,
    )
    return made, 1.0 if study.guidance is None else study.guidance


def _append(path: File, record: Mapping[str, Any]) -> None:
    line = json.dumps(json.loads(records.dumps(record)), ensure_ascii=False)
    # a line that was cut short stays by itself
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + line + "\n")


def _lines(path: File) -> Iterator[dict[str, Any]]:
    """The records of a file; a last line that was cut short does not count."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
