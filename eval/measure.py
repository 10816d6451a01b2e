"""One sample: generate, listen, and keep what was heard."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from dit_accel import presets
from dit_accel.errors import InputError
from dit_accel.eval import instrument, operations
from dit_accel.eval.samples import (
    PARTS,
    Density,
    Flops,
    Key,
    Sample,
    Seconds,
    Settings,
    Variant,
)
from dit_accel.eval.store import Store, stack_steps
from dit_accel.eval.variants import fingerprint
from dit_accel.pipelines import accelerate, load
from dit_accel.pipelines.families import models_of
from dit_accel.pipelines.generate import generate
from dit_accel.pipelines.request import Request


class Bench:
    """A loaded pipeline that makes the samples of a run, one by one.

    Args:
        pipe: from `dit_accel.pipelines.load`.
        settings: of the run.
        sharing: processes that use the same device, this one included.
    """

    def __init__(self, pipe: Any, settings: Settings, sharing: int = 1) -> None:
        self._pipe, self._settings, self._sharing = pipe, settings, sharing
        self._warm: set[str] = set()
        self._other: dict[str, float] | None = None
        self._why: str | None = None
        self._tally = operations.Tally()

    def make(
        self, store: Store, key: Key, on_step: Callable[[int, int], None] | None = None
    ) -> Sample:
        """Generate a sample, and put it into the store."""
        settings, pipe = self._settings, self._pipe
        variant, prompt = settings.variant(key.variant), settings.prompts[key.prompt]
        self._count()
        self._choose(variant)
        request = Request(
            prompt.text,
            settings.negative_prompt,
            settings.height,
            settings.width,
            settings.frames,
            settings.steps,
            settings.guidance,
            key.seed,
        )
        if variant.slug not in self._warm and settings.warmup:
            generate(pipe, replace(request, steps=settings.warmup))
        self._warm.add(variant.slug)
        absent: dict[str, str] = {}
        peak = instrument.Peak(pipe._execution_device)
        peak.start()
        self._tally.clear()
        with instrument.listening(pipe) as recorder, instrument.forwards(pipe) as counts:
            made = generate(pipe, request, on_step, keep_latents=settings.latents)
        try:
            peak_bytes = peak.bytes()
        except OSError as error:
            peak_bytes, absent["peak_bytes"] = None, str(error)
        flops: Flops | None = None
        if self._other is None or self._tally.unknown is not None:
            absent["flops"] = self._why or self._tally.unknown or "not counted"
        else:
            flops = instrument.flops_of(pipe, self._other, counts, self._tally.total())
        assert made.density is not None
        sample = Sample(
            variant=variant.slug,
            method=variant.method,
            options=variant.options,
            prompt=prompt.number,
            text=prompt.text,
            seed=key.seed,
            media="",
            shape=(0, 0, 0, 0),
            seconds=Seconds(made.seconds, made.step_seconds, made.decode_seconds),
            density=Density(made.density, made.by_step, made.by_layer, made.by_cell),
            attention_seconds=recorder.layers("linear", operations.SPAN),
            breakdown={part: took for part, took in recorder.parts().items() if part in PARTS},
            peak_bytes=peak_bytes,
            flops=flops,
            absent=absent,
            device=self._device(),
            sharing=self._sharing,
        )
        store.put(sample, made.frames, made.latents, settings.fps, stack_steps(made.step_latents))
        return store.sample(key)

    def _choose(self, variant: Variant) -> None:
        method = presets.build(variant.method, **variant.given)
        accelerate(self._pipe, operations.counted(method, self._tally))
        use_backend(models_of(self._pipe).values(), variant.backend)

    def _count(self) -> None:
        """Count one forward's operations, once in a process."""
        if self._other is not None or self._why is not None:
            return
        settings = self._settings
        self._choose(settings.variants[0])
        request = Request(
            settings.prompts[0].text,
            settings.negative_prompt,
            settings.height,
            settings.width,
            settings.frames,
            # both transformers of a model with two run
            1 if len(models_of(self._pipe)) == 1 else settings.steps,
            settings.guidance,
        )
        try:
            with instrument.counting(self._pipe) as other:
                generate(self._pipe, request)
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            self._why = f"torch could not count them: {error}"
            return
        self._other = other
        if set(other) != set(models_of(self._pipe)):
            missing = ", ".join(set(models_of(self._pipe)) - set(other))
            self._other, self._why = None, f"{missing} never ran"

    def _device(self) -> str:
        device = self._pipe._execution_device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def use_backend(models: Iterable[Any], name: str | None) -> None:
    """Let diffusers compute dense attention by one of its backends, in these transformers alone.

    ``model.set_attention_backend`` would also change the default of every other model.
    """
    backend = None if name is None else AttentionBackendName(name)
    for model in models:
        for module in model.modules():
            if hasattr(getattr(module, "processor", None), "_attention_backend"):
                module.processor._attention_backend = backend


def load_for(settings: Settings, device: str) -> Any:
    """The pipeline of a run, on a device.

    Raises:
        InputError: it is not the model that the run began with.
    """
    if fingerprint(settings.model) != settings.fingerprint:
        raise InputError("model: expected the files that the run began with, got other ones")
    pipe = load(settings.model, dtype=getattr(torch, settings.dtype), device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
