"""What a run comes to: figures with their sample count and interval, and what is not there and why.

``summary.json`` is a `Summary`. A figure that could not be computed is no figure: it is in
``absent``, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

Group = Literal["fidelity", "distribution", "vbench", "semantic", "speed", "seconds"]


@dataclass(frozen=True, slots=True)
class Measure:
    """What a figure is.

    Attributes:
        name: its key, such as ``psnr``.
        title: for people.
        unit: empty for plain numbers.
        better: which way is better; ``None`` where neither is.
        group: what it belongs to.
        about: one line.
    """

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"] | None
    group: Group
    about: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, with how sure it is.

    Attributes:
        value: the estimate; infinite for the PSNR of equal clips.
        low, high: bounds of its 95% interval; ``None`` where there are too few samples for one.
        count: of independent samples: prompts, whose seeds are averaged first, or, for a
            distribution, clips.
    """

    value: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True, slots=True)
class VariantSummary:
    """One variant of a run.

    Attributes:
        slug, method, role, options: as in `dit_accel.eval.store.Variant`.
        samples, failed: how many are there, and how many were tried and are not.
        figures: by the measure's name.
        absent: by the measure's name, why there is no figure.
        by_step, by_layer: density, measured, mean over the samples.
        attention_seconds: of one sample, by layer, median over the samples.
        breakdown: seconds of one sample, by part, median over the samples.
        each: by the measure's name, then by the sample's name (``0000-seed``), the single values
            that a figure was made of. A distribution has none.
        by_frame: ``psnr``, ``ssim`` and ``lpips`` of every frame, mean over the samples.
    """

    slug: str
    method: str
    role: Literal["dense", "floor", "method"]
    options: dict[str, object]
    samples: int
    failed: int
    figures: dict[str, Figure]
    absent: dict[str, str]
    by_step: dict[int, float]
    by_layer: dict[int, float]
    attention_seconds: dict[int, float]
    breakdown: dict[str, float]
    each: dict[str, dict[str, float]] = field(default_factory=dict)
    by_frame: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """``summary.json``.

    Attributes:
        measures: what the figures are, by name, in the order in which to show them.
        variants: dense first.
        complete: whether every sample of the run is there.
        notes: what a reader should know of how these figures were made.
        sharing: most processes that shared a device while samples were made; above 1 times are of a
            busy one.
    """

    measures: dict[str, Measure]
    variants: tuple[VariantSummary, ...]
    complete: bool
    notes: tuple[str, ...] = ()
    sharing: int = 1
    schema: int = 1

    def variant(self, slug: str) -> VariantSummary:
        """The variant of this name."""
        return next(variant for variant in self.variants if variant.slug == slug)


_HIGHER: Final = "higher"
_LOWER: Final = "lower"

MEASURES: Final = {
    measure.name: measure
    for measure in (
        Measure("psnr", "PSNR", "dB", _HIGHER, "fidelity", "of all frames, to the dense clip"),
        Measure("ssim", "SSIM", "", _HIGHER, "fidelity", "mean over the frames, to the dense clip"),
        Measure("lpips", "LPIPS", "", _LOWER, "fidelity", "mean over the frames, AlexNet"),
        Measure(
            "latent_error", "latent error", "", _LOWER, "fidelity",
            "relative L2 of the final latents to the dense ones",
        ),
        Measure(
            "psnr_worst_frame", "PSNR, worst frame", "dB", _HIGHER, "fidelity",
            "of the frame that is furthest from the dense one",
        ),
        Measure("fid", "FID", "", _LOWER, "distribution", "to real clips"),
        Measure("kid", "KID", "", _LOWER, "distribution", "to real clips; unbiased on few samples"),
        Measure("fid_dense", "FID to dense", "", _LOWER, "distribution", "to the dense clips"),
        Measure("kid_dense", "KID to dense", "", _LOWER, "distribution", "to the dense clips"),
        Measure(
            "subject_consistency", "subject consistency", "", _HIGHER, "vbench",
            "likeness of DINO features from frame to frame",
        ),
        Measure(
            "background_consistency", "background consistency", "", _HIGHER, "vbench",
            "likeness of CLIP features from frame to frame",
        ),
        Measure(
            "temporal_flickering", "temporal flickering", "", _HIGHER, "vbench",
            "255 less the mean absolute difference of neighbouring frames, over 255",
        ),
        Measure(
            "motion_smoothness", "motion smoothness", "", _HIGHER, "vbench",
            "how well frames are told by their neighbours (AMT)",
        ),
        Measure(
            "dynamic_degree", "dynamic degree", "", None, "vbench",
            "share of clips with large optical flow (RAFT)",
        ),
        Measure(
            "aesthetic_quality", "aesthetic quality", "", _HIGHER, "vbench",
            "LAION's predictor on CLIP features",
        ),
        Measure("imaging_quality", "imaging quality", "", _HIGHER, "vbench", "MUSIQ"),
        Measure("colour", "colour", "", _HIGHER, "semantic", "clips in the prompt's colour"),
        Measure("shape", "shape", "", _HIGHER, "semantic", "clips with the prompt's shape"),
        Measure("motion", "motion", "", _HIGHER, "semantic", "clips with the prompt's motion"),
        Measure("all_three", "all three", "", _HIGHER, "semantic", "clips with all of these"),
        Measure(
            "spatial_relation", "spatial relation", "", _HIGHER, "semantic",
            "clips whose shapes stand as the prompt says",
        ),
        Measure("density", "density", "", None, "speed", "exact pairs over all pairs, measured"),
        Measure(
            "speedup", "speed-up", "×", _HIGHER, "speed",
            "denoising time of dense over that of the variant, median over paired samples",
        ),
        Measure(
            "attention_speedup", "attention speed-up", "×", _HIGHER, "speed",
            "time in self-attention of dense over that of the variant, projections excluded",
        ),
        Measure("seconds", "time", "s", _LOWER, "seconds", "of the pipeline's call, median"),
        Measure("step_seconds", "time per step", "s", _LOWER, "speed", "median over all steps"),
        Measure("denoise_seconds", "denoising", "s", _LOWER, "seconds", "all steps, median"),
        Measure("decode_seconds", "decoding", "s", _LOWER, "seconds", "median"),
        Measure(
            "attention_seconds", "attention", "s", _LOWER, "seconds",
            "self-attention of all layers and steps, projections excluded, median",
        ),
        Measure("peak_memory", "peak memory", "MiB", _LOWER, "speed", "weights included, largest"),
        Measure("flops", "operations", "TFLOP", _LOWER, "speed", "of the transformers' forwards"),
    )
}  # fmt: skip
"""Every figure that there can be."""
