"""VBench's dimensions of video quality (Huang et al. 2024), by its definitions and names.

Temporal flickering needs no weights, and is computed here. The other six go through the ``vbench``
package (0.1.5), if it and its weights are installed; nothing is downloaded for them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dit_accel.errors import InputError

_FILES: Final = {
    "subject_consistency": (
        "dino_model/dino_vitbase16_pretrain.pth",
        "dino_model/facebookresearch_dino_main",
    ),
    "background_consistency": ("clip_model/ViT-B-32.pt",),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": (
        "clip_model/ViT-L-14.pt",
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
    ),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
}
"""What each dimension loads, under the package's folder of weights."""
NEEDS_WEIGHTS: Final = tuple(_FILES)
DIMENSIONS: Final = ("temporal_flickering", *NEEDS_WEIGHTS)

Scores = dict[str, float]
"""By the path of a clip."""


def temporal_flickering(frames: Tensor) -> float:
    """``(255 - MAE) / 255``: how little neighbouring frames differ, in 8 bits.

    The mean absolute difference of the pixels is taken for each pair of neighbours, then the mean
    over the pairs. VBench means it for prompts of static scenes: elsewhere it also falls with
    motion.

    Args:
        frames: ``[T, 3, H, W]`` in [0, 1], at least two.

    Raises:
        InputError: it is no clip.
    """
    if frames.ndim != 4 or len(frames) < 2:
        raise InputError(f"frames: expected [T >= 2, 3, H, W], got {list(frames.shape)}")
    pixels = (frames.double().clamp(0, 1) * 255).round()
    each = pixels.diff(dim=0).abs().flatten(1).mean(1)
    return float((255 - each.mean()) / 255)


def reasons() -> dict[str, str]:
    """Which dimensions cannot be run here, and why."""
    if importlib.util.find_spec("vbench") is None:
        return dict.fromkeys(NEEDS_WEIGHTS, "the vbench package is not installed")
    found = {}
    for name, files in _FILES.items():
        missing = [file for file in files if not (_cache() / file).exists()]
        if missing:
            found[name] = f"vbench's weights {', '.join(missing)} are not in {_cache()}"
    return found


def _cache() -> Path:
    given = os.environ.get("VBENCH_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "vbench"


def by_package(
    clips: Sequence[Path], dimensions: Sequence[str], device: str
) -> dict[str, Scores | str]:
    """Scores of clips by the ``vbench`` package, or why a dimension failed.

    Args:
        clips: mp4 files.
        dimensions: those that `reasons` has nothing to say of.
        device: ``cpu`` or ``cuda``.
    """
    from vbench import VBench

    found: dict[str, Scores | str] = {}
    with tempfile.TemporaryDirectory() as room:
        videos, results = Path(room) / "videos", Path(room) / "results"
        videos.mkdir()
        names = {}
        for i, clip in enumerate(clips):
            names[f"{i:06d}"] = str(clip)
            (videos / f"{i:06d}{clip.suffix}").symlink_to(clip.resolve())
        for dimension in dimensions:
            try:
                # it tells its progress on stdout, where our results go
                with contextlib.redirect_stdout(sys.stderr):
                    judge = VBench(torch.device(device), "", str(results))
                    judge.evaluate(
                        videos_path=str(videos),
                        name=dimension,
                        dimension_list=[dimension],
                        local=True,
                        mode="custom_input",
                    )
                text = (results / f"{dimension}_eval_results.json").read_text(encoding="utf-8")
                found[dimension] = _scores(names, *json.loads(text)[dimension])
            except Exception as error:
                found[dimension] = f"vbench failed: {type(error).__name__}: {error}"
    return found


def _scores(names: Mapping[str, str], mean: float, rows: Sequence[Mapping[str, Any]]) -> Scores:
    each = {names[Path(row["video_path"]).stem]: float(row["video_results"]) for row in rows}
    # imaging_quality reports its mean over 100, and the clips as MUSIQ has them
    plain = sum(each.values()) / len(each)
    scale = float(mean) / plain if plain else 1.0
    return {path: value * scale for path, value in each.items()}


def layout(scores: Mapping[str, Scores]) -> dict[str, list[Any]]:
    """VBench's own layout of results: by dimension the mean, and a row for every clip."""
    return {
        name: [
            sum(each.values()) / len(each),
            [{"video_path": path, "video_results": value} for path, value in each.items()],
        ]
        for name, each in scores.items()
        if each
    }
