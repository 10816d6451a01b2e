"""What a run's files hold: settings, samples, failures. `dit_accel.eval.store` keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

from dit_accel.errors import InputError

SCHEMA: Final = 2
"""Version of the format; a reader refuses another one."""
DENSE: Final = "dense"
"""Slug of the variant that everything is compared with."""
PARTS: Final = ("layout", "route", "attend", "merge", "linear", "other")
"""Parts of the time breakdown; together they are the time of the transformers' forwards."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a run.

    Attributes:
        number: its place in the list, from 0.
        text: what the model is given.
        dimensions: of VBench, that it is meant for.
        auxiliary: VBench's ``auxiliary_info``.
    """

    number: int
    text: str
    dimensions: tuple[str, ...] = ()
    auxiliary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute attention, under which every prompt is generated.

    Attributes:
        slug: its name in this run and its folder, such as ``pisa-0.15``.
        method: the preset.
        role: ``dense`` is what others are compared with; ``floor`` is dense too, by another
            attention backend, which shows what rounding alone does; all others are ``method``.
        given: options that were asked for, as `presets.build` takes them.
        options: the effective ones, for reading.
        backend: attention backend of diffusers; ``None`` is its default.
    """

    slug: str
    method: str
    role: Literal["dense", "floor", "method"]
    given: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    backend: str | None = None

    @property
    def density(self) -> float | None:
        """The density that was asked for, where the method has such an option, as one number."""
        value = self.options.get("density")
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides what a run computes. A folder holds one of these, for ever.

    Attributes:
        model: as `dit_accel.pipelines.load` takes it.
        fingerprint: of the model's files; ``None`` for a model of a hub.
        variants, prompts: `dense` is the first variant.
        seeds: prompt ``n`` is generated from the seeds ``s + n``, by every variant alike.
        steps, guidance, height, width, frames, negative_prompt: of the generation.
        fps: frames per second of the clips.
        dtype: such as ``float32``.
        device: ``cpu`` or ``cuda``.
        latents: whether the latents of every step are kept, beside the final ones.
        warmup: steps that are generated, and thrown away, before a process measures a variant.
    """

    model: str
    fingerprint: str | None
    variants: tuple[Variant, ...]
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    height: int
    width: int
    frames: int
    negative_prompt: str | None
    fps: int
    dtype: str
    device: str
    latents: bool = False
    warmup: int = 1

    def variant(self, slug: str) -> Variant:
        """The variant of this name.

        Raises:
            InputError: there is none.
        """
        for variant in self.variants:
            if variant.slug == slug:
                return variant
        known = ", ".join(variant.slug for variant in self.variants)
        raise InputError(f"variant: expected one of {known}, got {slug!r}")

    def every_key(self) -> list[Key]:
        """Every sample of the run, prompt by prompt, dense first."""
        return [
            Key(variant.slug, prompt.number, seed + prompt.number)
            for prompt in self.prompts
            for seed in self.seeds
            for variant in self.variants
        ]


@dataclass(frozen=True, slots=True)
class Run:
    """``run.json``.

    Attributes:
        settings: what is computed.
        command: that began the run.
        created: when, in seconds since 1970.
        versions, machine: see `dit_accel.eval.records`.
    """

    settings: Settings
    command: tuple[str, ...]
    created: float
    versions: dict[str, str | None]
    machine: dict[str, Any]
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """The name of a sample: variant, number of the prompt, seed."""

    variant: str
    prompt: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder: ``0000-seed``."""
        return f"{self.prompt:04d}-{self.seed}"


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time of a sample went, in seconds.

    Attributes:
        total: of the pipeline's call.
        steps: of every denoising step, all guidance branches together.
        decode: from the last step to the frames.
    """

    total: float
    steps: tuple[float, ...]
    decode: float

    @property
    def denoise(self) -> float:
        """Of all steps together."""
        return sum(self.steps)


@dataclass(frozen=True, slots=True)
class Density:
    """Exact pairs over all pairs of self-attention, measured: altogether and in parts.

    ``by_cell`` is by step, and then by layer.
    """

    total: float
    by_step: dict[int, float]
    by_layer: dict[int, float]
    by_cell: dict[int, dict[int, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations of all forwards of the transformers in one sample.

    Attributes:
        attention: 4 · head size · pairs computed exactly, from the measured density.
        dense_attention: the same for all pairs.
        other: all but self-attention's products: linear layers, cross-attention, convolutions.
        layout, route, rest: of a sparse method beside its exact pairs; see
            `dit_accel.eval.operations`.
    """

    attention: float
    dense_attention: float
    other: float
    layout: float
    route: float
    rest: float

    @property
    def total(self) -> float:
        """Attention as computed, what the method adds to it, and everything else."""
        return self.attention + self.layout + self.route + self.rest + self.other


@dataclass(frozen=True, slots=True)
class Sample:
    """``sample.json``: one generation.

    Attributes:
        variant, method, options: how attention was computed.
        prompt: its number.
        text, seed: what it was made from.
        media: name of the file to look at.
        shape: of the frames, ``(T, 3, H, W)``.
        seconds: measured by the clock of the device.
        density: measured.
        attention_seconds: of self-attention, projections excluded, by layer, in all steps together;
            empty if not recorded.
        breakdown: seconds by `PARTS`; empty if not recorded.
        peak_bytes: memory at the peak of the call, weights included.
        flops: counted.
        absent: what was not measured, and why, by the attribute's name.
        device: that it ran on.
        sharing: processes of the run that used this device at once, this one included; times of
            more than one tell of each other.
    """

    variant: str
    method: str
    options: dict[str, Any]
    prompt: int
    text: str
    seed: int
    media: str
    shape: tuple[int, int, int, int]
    seconds: Seconds
    density: Density
    attention_seconds: dict[int, float]
    breakdown: dict[str, float]
    peak_bytes: int | None
    flops: Flops | None
    absent: dict[str, str]
    device: str
    sharing: int = 1

    @property
    def key(self) -> Key:
        """Its name."""
        return Key(self.variant, self.prompt, self.seed)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sample is not there."""

    variant: str
    prompt: int
    text: str
    seed: int
    error: str
    trace: str = ""

    @property
    def key(self) -> Key:
        """Name of the sample that is missing."""
        return Key(self.variant, self.prompt, self.seed)
