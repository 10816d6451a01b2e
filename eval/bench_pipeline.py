"""Forwards of whole transformers of real dimensions: dense attention against methods.

Weights are random (`pipeline_models`), so nothing is said of fidelity. Every method is checked
first, on a small transformer of the same family, head size and dtype. Dense attention is diffusers'
own code with a backend that is named; it is timed in turn with the methods, and ratios are medians
over these turns. Parts are timed in a pass of their own (`pipeline_parts`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dit_accel import presets
from dit_accel.errors import InputError
from dit_accel.eval import pipeline_models
from dit_accel.eval.measure import use_backend
from dit_accel.eval.pipeline_models import Layers, Spec
from dit_accel.eval.pipeline_parts import PARTS, divided, seconds_by_part
from dit_accel.eval.pipeline_steps import Plan, check_extrapolation, plan
from dit_accel.eval.pipeline_totals import DENSE, extrapolated, means, reduced
from dit_accel.method import Method
from dit_accel.pipelines import accelerate, restore, session_of
from dit_accel.recorder import Stamp, Watch

_WARM = 3
"""Layers of a kind on which kernels are compiled; methods treat no more of them differently."""
BACKENDS = {"cudnn": "_native_cudnn", "flash": "_native_flash", "sdpa": None}
"""Who computes dense attention, and cross-attention, and what diffusers calls that."""


class IncorrectError(RuntimeError):
    """A method that is not correct was not timed."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is measured, and how.

    Attributes:
        methods: by name; dense attention is there in any case.
        dtype: of weights and inputs.
        device: ``"cuda"`` or ``"cpu"``.
        batch: elements of one forward.
        backend: of `BACKENDS`.
        num_steps: denoising steps of a run; what a mean step is made of, and what schedules see.
        repeats: turns of all methods.
        each: forwards of every kind of step in a turn.
        splits: turns of the pass that divides the time; 0 leaves it out.
        seed: of weights and inputs.
    """

    methods: Mapping[str, Method]
    dtype: torch.dtype
    device: str
    batch: int = 1
    backend: str = "sdpa"
    num_steps: int = 50
    repeats: int = 5
    each: int = 3
    splits: int = 2
    seed: int = 0


@dataclass(slots=True)
class _Times:
    """Of one method with one number of layers: milliseconds by kind of step."""

    plan: Plan
    turns: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    densities: dict[str, float] = field(default_factory=dict)
    peak: int | None = None


def run(
    names: Sequence[str],
    asked: Asked,
    *,
    layers: tuple[int, int] | None = (1, 4),
    whole: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Check and time.

    Args:
        names: of `pipeline_models.MODELS`.
        asked: what and how.
        layers: two rising numbers of layers, from which times of the real number are extrapolated;
            ``None`` leaves that out.
        whole: also time the real number of layers.
        say: told what is done, and results when they are there.

    Returns:
        Plain types, for JSON: by model the runs, each with its methods, and what was extrapolated.

    Raises:
        InputError: something does not fit; told before anything is built.
    """
    specs = {name: pipeline_models.get(name) for name in names}
    _check(asked, layers, whole)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if asked.device == "cuda" else asked.device,
        "dtype": str(asked.dtype).removeprefix("torch."),
        "batch": asked.batch,
        "dense_backend": asked.backend,
        "num_steps": asked.num_steps,
        "repeats": asked.repeats,
        "methods": {name: method.to_config() for name, method in asked.methods.items()},
        "models": {},
    }
    for name, spec in specs.items():
        say(f"{name}: {spec.transformer}, {spec.tokens:,} tokens")
        right, wrong = _checked(spec, asked, say)
        one = replace(asked, methods=right)
        entry: dict[str, Any] = {
            "transformer": spec.transformer,
            "tokens": spec.tokens,
            "grid": spec.grid,
            "layers": dict(spec.layers),
            "forwards": spec.forwards,
            "wrong": wrong,
            "runs": [],
        }
        found["models"][name] = entry
        if layers is not None:
            entry["runs"] = [_run(spec, counts, one, say) for counts in reduced(spec, layers)]
            entry["extrapolated"] = extrapolated(spec, entry["runs"], layers)
        if whole:
            entry["whole"] = _run(spec, spec.layers, one, say)
    return found


def _check(asked: Asked, layers: tuple[int, int] | None, whole: bool) -> None:
    for name, value, least in (
        ("batch", asked.batch, 1),
        ("num_steps", asked.num_steps, 1),
        ("repeats", asked.repeats, 1),
        ("each", asked.each, 1),
        ("splits", asked.splits, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name}: expected an integer, {least} or more, got {value!r}")
    if asked.backend not in BACKENDS:
        raise InputError(f"backend: expected {' | '.join(BACKENDS)}, got {asked.backend!r}")
    if asked.backend == "cudnn" and asked.device == "cpu":
        raise InputError("backend: expected one that a CPU has (sdpa), got 'cudnn'")
    if layers is None and not whole:
        raise InputError("layers: expected two numbers of layers, or the whole, got neither")
    if layers is not None:
        if not 1 <= layers[0] < layers[1]:
            raise InputError(f"layers: expected two numbers that rise from 1, got {layers}")
        for name, method in asked.methods.items():
            check_extrapolation(name, method)


# -- is it right ----------------------------------------------------------------------------------


def _checked(
    spec: Spec, asked: Asked, say: Callable[[str], None]
) -> tuple[dict[str, Method], dict[str, str]]:
    right, wrong = {}, {}
    for name, method in asked.methods.items():
        try:
            check(spec, method, asked.dtype, asked.device)
            right[name] = method
            say(f"  {name}: correct")
        except Exception as error:  # whatever it is, the other methods go on
            wrong[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"  {name}: not timed: {wrong[name]}")
    return right, wrong


def full(method: Method) -> Method:
    """The same preset with everything exact, and no step or layer left dense."""
    every: dict[str, Any] = {
        "density": 1.0,
        "threshold": 1.0,
        "p": 1.0,
        "ratios": (1.0, 1.0, 1.0, 1.0),
        "dense_steps": 0,
        "dense_layers": (),
        "dense_below": 0,
    }
    known = method.options
    return presets.build(
        method.name, **{**known, **{name: every[name] for name in every if name in known}}
    )


def check(spec: Spec, method: Method, dtype: torch.dtype, device: str) -> None:
    """On three layers of two heads, everything exact, a method is dense attention.

    Within twice the error of stock diffusers in ``dtype`` against a wider one, in two steps.

    Raises:
        IncorrectError: it is not.
    """
    small = pipeline_models.small(spec)
    layers = dict.fromkeys(spec.layers, 3)
    model = pipeline_models.build(small, layers, dtype, device)
    inputs = small.inputs(small, 1, dtype, device)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    exact = pipeline_models.widened(model, wide)(
        **{
            name: x.to(wide) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in inputs.items()
        }
    )[0]
    low = model(**inputs)[0]
    size = float(exact.abs().max())
    bound = 2 * float((low - exact).abs().max()) + 8 * torch.finfo(dtype).eps * size
    accelerate(model, full(method))
    for step in range(2):
        with model.cache_context("cond", step_index=step, num_inference_steps=2):
            out = model(**inputs)[0]
        worst = float((out - exact).abs().max())
        if not worst <= bound:
            raise IncorrectError(
                f"{method.name}: expected dense attention within {bound:.2g} where all is exact, "
                f"got an error of {worst:.2g} in step {step}"
            )


# -- how long does it take ------------------------------------------------------------------------


def _run(spec: Spec, layers: Layers, asked: Asked, say: Callable[[str], None]) -> dict[str, Any]:
    """One number of layers: every method in turn with dense attention."""
    inputs = spec.inputs(spec, asked.batch, asked.dtype, asked.device)
    plans = {DENSE: Plan(((0, DENSE),), {DENSE: asked.num_steps})}
    plans |= {
        name: plan(method, asked.num_steps, asked.each) for name, method in asked.methods.items()
    }
    times = {name: _Times(one) for name, one in plans.items()}
    few = {kind: min(count, _WARM) for kind, count in layers.items()}
    model = pipeline_models.build(spec, few, asked.dtype, asked.device, asked.seed)
    try:
        use_backend([model], BACKENDS[asked.backend])
        for name, of in times.items():  # compiles, and is not counted
            _turn(model, inputs, name, of, asked, count=False)
        if few != layers:
            restore(model)
            model = None  # before there is another
            model = pipeline_models.build(spec, layers, asked.dtype, asked.device, asked.seed)
            use_backend([model], BACKENDS[asked.backend])
        for turn in range(asked.repeats):
            for name, of in times.items():
                _turn(model, inputs, name, of, asked, count=True)
            for of in times.values():
                for kind, listed in of.turns.items():
                    dense = times[DENSE].turns[DENSE][turn]
                    of.ratios.setdefault(kind, []).append(dense / listed[turn])
        for _ in range(asked.splits):
            for name, of in times.items():
                _split(model, inputs, name, of, asked)
        result: dict[str, Any] = {
            "layers": dict(layers),
            "parameters": pipeline_models.parameters(model),
            "methods": {name: _told(of, asked, spec) for name, of in times.items()},
        }
    finally:
        if model is not None:
            restore(model)
        del model
        gc.collect()
        if asked.device == "cuda":
            torch.cuda.empty_cache()
    label = " + ".join(f"{count}" for count in layers.values())
    for name, one in result["methods"].items():
        say(f"  {label} layers, {name}: {one['mean_ms']:.2f} ms a forward")
    return result


def _choose(model: Any, name: str, asked: Asked) -> None:
    restore(model)
    if name != DENSE:
        accelerate(model, asked.methods[name])


def _turn(
    model: Any, inputs: Mapping[str, Any], name: str, of: _Times, asked: Asked, *, count: bool
) -> None:
    """One trajectory of a method, from an empty memory."""
    _choose(model, name, asked)
    watch = Watch(asked.device)
    cuda = asked.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    watch.wait()
    stamps: list[tuple[str, Stamp, Stamp]] = []
    for step, kind in of.plan.steps:
        with model.cache_context("cond", step_index=step, num_inference_steps=asked.num_steps):
            start = watch.now()
            out = model(**inputs)[0]
            stamps.append((kind, start, watch.now()))
    watch.wait()
    if not bool(out.isfinite().all()):
        raise IncorrectError(f"{name}: expected finite output, got NaN or inf")
    if not count:
        return
    found: dict[str, list[float]] = {}
    for kind, start, stop in stamps:
        found.setdefault(kind, []).append(1e3 * Watch.seconds(start, stop))
    for kind, listed in found.items():
        of.turns.setdefault(kind, []).append(median(listed))
    if cuda:
        of.peak = max(of.peak or 0, torch.cuda.max_memory_allocated())
    if name == DENSE:
        of.densities = {DENSE: 1.0}
    elif not of.densities:
        by_step = session_of(model).log.by_step
        of.densities = {kind: by_step[step] for step, kind in of.plan.steps}


def _split(model: Any, inputs: Mapping[str, Any], name: str, of: _Times, asked: Asked) -> None:
    """One trajectory with the clock inside."""
    _choose(model, name, asked)
    for step, kind in of.plan.steps:
        with (
            model.cache_context("cond", step_index=step, num_inference_steps=asked.num_steps),
            divided(model, asked.device) as recorder,
        ):
            model(**inputs)
        parts = {part: 1e3 * took for part, took in seconds_by_part(recorder).items()}
        of.parts.setdefault(kind, []).append(parts)


def _told(of: _Times, asked: Asked, spec: Spec) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for kind, count in of.plan.counts.items():
        took = median(of.turns[kind])
        kinds[kind] = {
            "count": count,
            "ms": took,
            "turns": of.turns[kind],
            "ratio": median(of.ratios[kind]),
            "density": of.densities[kind],
        }
        if kind in of.parts:
            parts = {part: median(one[part] for one in of.parts[kind]) for part in PARTS}
            kinds[kind] |= {"parts": parts, "remainder_ms": took - sum(parts.values())}
    return {"kinds": kinds, **means(kinds, spec), "peak_bytes": of.peak}
