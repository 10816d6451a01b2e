"""What papers and their public code use for a model.

>>> from dit_accel import presets
>>> found = presets.for_model("black-forest-labs/FLUX.1-dev")["pisa"]
>>> found.build().schedule.dense_layers
(0, 1, 2, 3)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dit_accel.errors import InputError
from dit_accel.method import Method
from dit_accel.options import closest, plain
from dit_accel.registry import build


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A method for a model, as somebody published it.

    Attributes:
        method: the name of a preset.
        options: of the preset; what is missing is its default.
        source: the paper, or the file of the public code, and what it was set for.
        note: where ours differs from it.
    """

    method: str
    options: Mapping[str, Any]
    source: str
    note: str = ""

    def build(self, **options: Any) -> Method:
        """The method, with options of one's own over the suggested ones."""
        return build(self.method, **{**self.options, **options})

    def to_config(self) -> dict[str, Any]:
        """As `dit_accel.Method.from_config` takes it."""
        return {"method": self.method, "options": plain(self.options)}


@dataclass(frozen=True, slots=True)
class _Model:
    """Models that share their settings: hub ids, and what their transformer's config says."""

    ids: tuple[str, ...]
    transformer: str
    sizes: Mapping[str, int]
    two: bool = False
    suggestions: tuple[Suggestion, ...] = field(default=())


_PISA: Final = "PISA, arXiv 2602.01077"
_SVG: Final = "svg-project/Sparse-VideoGen on GitHub, scripts"
_PSA: Final = "ziplab/Pyramid-Sparse-Attention on GitHub, configs/attention_config.yaml"
_BY_TOP_P: Final = (
    "the script keeps 90% of the clusters' score, at least 10% of the clusters; here a share of "
    "the keys is kept, as large as the density that the paper reports"
)
_PISA_VIDEO: Final = Suggestion(
    "pisa",
    {"density": 0.15, "block_size": 64, "block_q": 64},
    f"{_PISA}: blocks of 64, density 0.15",
)


def _svg_ear(source: str, note: str = _BY_TOP_P, **options: Any) -> Suggestion:
    clusters = {"q_clusters": 300, "k_clusters": 1000, "dense_layers": (0,)}
    return Suggestion("svg_ear", {**clusters, **options}, source, note)


def _psa(name: str, steps: str, block_k: int, note: str = "", **options: Any) -> Suggestion:
    warm, _, every = steps.partition(" of ")
    given = {
        "mode": "threshold",
        "block_q": 128,
        "block_k": block_k,
        "dense_steps": int(warm) / int(every),
    }
    source = f"{_PSA}, {name}: dense for {steps} steps"
    return Suggestion("psa", {**given, **options}, source, note)


_WAN: Final = "WanTransformer3DModel"
_14B: Final = {"num_layers": 40, "num_attention_heads": 40}
_TABLE: Final = (
    _Model(
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers",),
        _WAN,
        {**_14B, "in_channels": 16},
        suggestions=(
            _PISA_VIDEO,
            _svg_ear(
                f"{_SVG}/wan/wan_t2v_720p_ear.sh: 1280x720, 50 steps, dense for 20% of the steps "
                "and 3% of the layers",
                density=0.22,
                dense_steps=0.2,
            ),
            _psa("Wan2.1_14b", "15 of 50", 128, ratios="wan-14b"),
        ),
    ),
    _Model(
        ("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
        _WAN,
        {**_14B, "in_channels": 36},
        suggestions=(
            _svg_ear(
                f"{_SVG}/wan/wan_i2v_720p_ear.sh: 1280x720, 40 steps, dense for 35% of the steps "
                "and 3% of the layers",
                density=0.22,
                dense_steps=0.35,
            ),
        ),
    ),
    _Model(
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
        _WAN,
        {"num_layers": 30, "num_attention_heads": 12, "in_channels": 16},
        suggestions=(
            _psa("Wan2.1_1.3b", "15 of 50", 128, ratios="wan-1.3b", similarity_cap=True),
            Suggestion(
                "vmoba",
                {"threshold": 0.25, "dense_steps": 0.24},
                "VMoBA, arXiv 2506.23858: 832x480, threshold 0.25, without training dense for 12 "
                "of 50 steps",
                "its time chunks, windows and boxes are made for 20 x 30 x 52 latent cells",
            ),
        ),
    ),
    _Model(
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers",),
        _WAN,
        {**_14B, "in_channels": 16},
        two=True,
        suggestions=(
            _svg_ear(
                "SVG-EAR, arXiv 2603.08982: 1280x720, density 0.26",
                "the paper's density; clusters and dense steps are those of its script for Wan 2.1",
                density=0.26,
                dense_steps=0.2,
            ),
            _psa("Wan2.2_A14B", "12 of 40", 32, ratios=(0.5, 0.6, 0.6, 0.8)),
        ),
    ),
    _Model(
        ("Wan-AI/Wan2.2-I2V-A14B-Diffusers",),
        _WAN,
        {**_14B, "in_channels": 36},
        two=True,
        suggestions=(
            _svg_ear(
                "SVG-EAR, arXiv 2603.08982: 1280x720, density 0.236",
                "the paper's density; clusters and dense steps are those of its script for Wan 2.1",
                density=0.236,
                dense_steps=0.35,
            ),
        ),
    ),
    _Model(
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
        _WAN,
        {"num_layers": 30, "num_attention_heads": 24, "in_channels": 48},
        suggestions=(_psa("Wan2.2_5B", "15 of 50", 32, ratios=(0.6, 0.7, 0.7, 0.8)),),
    ),
    _Model(
        ("hunyuanvideo-community/HunyuanVideo", "tencent/HunyuanVideo"),
        "HunyuanVideoTransformer3DModel",
        {"num_layers": 20, "num_single_layers": 40, "num_attention_heads": 24},
        suggestions=(
            _PISA_VIDEO,
            _svg_ear(
                f"{_SVG}/hyvideo/hyvideo_t2v_720p_ear.sh: 1280x720, 50 steps, dense for 10% of the "
                "steps and 3% of the layers",
                density=0.222,
                q_clusters=400,
                dense_steps=0.1,
            ),
        ),
    ),
    _Model(
        (
            "black-forest-labs/FLUX.1-dev",
            "black-forest-labs/FLUX.1-schnell",
            "black-forest-labs/FLUX.1-Kontext-dev",
        ),
        "FluxTransformer2DModel",
        {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24},
        suggestions=(
            Suggestion(
                "pisa",
                {
                    "density": 0.15,
                    "layout": {"name": "tile3d", "tile": (1, 8, 8)},
                    "dense_layers": (0, 1, 2, 3),
                },
                f"{_PISA}, and xie-lab-ml/piecewise-sparse-attention on GitHub: FLUX.1-dev at "
                "1024x1024, 50 steps, tiles of 8x8, the first 4 layers dense",
            ),
        ),
    ),
)


def known_models() -> tuple[str, ...]:
    """Hub ids of the models that `for_model` has something for."""
    return tuple(name for model in _TABLE for name in model.ids)


def for_model(model: Any) -> dict[str, Suggestion]:
    """Methods for a model with the settings of their papers or public code, by method.

    Nothing is suggested that nobody published, and nothing here was measured by us.

    Args:
        model: a hub id, the directory of a pipeline, or a pipeline. The latter two are known by
            their transformer's sizes.

    Raises:
        InputError: the model is not known, or its sizes are those of several.

    Example:
        >>> from dit_accel import presets
        >>> presets.for_model("Wan-AI/Wan2.1-T2V-14B-Diffusers")["pisa"].options["density"]
        0.15
    """
    if isinstance(model, str | Path):
        found = [row for row in _TABLE if str(model).lower() in map(str.lower, row.ids)]
        path = Path(model).expanduser()
        if not found and (path / "model_index.json").is_file():
            found = [row for row in _TABLE if _fits(row, dict(_configs_in(path)))]
    else:
        found = [row for row in _TABLE if _fits(row, dict(_configs_of(model)))]
    if len(found) == 1:
        return {one.method: one for one in found[0].suggestions}
    names = ", ".join(name for row in found for name in row.ids)
    if found:
        raise InputError(f"model: expected one that can be told by its sizes, got that of {names}")
    got = repr(str(model)) if isinstance(model, str | Path) else f"a {type(model).__name__}"
    near = closest(str(model), known_models()) if isinstance(model, str) else ""
    raise InputError(
        f"model: expected one that a paper has settings for ({', '.join(known_models())}), got "
        f"{got}{near}"
    )


def _fits(row: _Model, configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether transformers with these configs, by their names in the pipeline, are a model's."""
    if row.two != (len(configs) == 2) or not configs:
        return False
    return all(
        config.get("_class_name") == row.transformer
        and all(config.get(name) == size for name, size in row.sizes.items())
        for config in configs.values()
    )


def _configs_in(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configs of the transformers in a pipeline's directory."""
    for file in sorted(path.glob("transformer*/config.json")):
        try:
            yield file.parent.name, json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"model: expected JSON in {str(file)!r}, got {error}") from None


def _configs_of(pipe: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configs of a pipeline's transformers."""
    components = getattr(pipe, "components", None)
    for name, part in components.items() if isinstance(components, dict) else ():
        config = getattr(part, "config", None)
        if name.startswith("transformer") and isinstance(config, Mapping):
            kind = type(getattr(part, "_orig_mod", part))  # torch.compile's wrapper
            yield name, {**config, "_class_name": kind.__name__}
