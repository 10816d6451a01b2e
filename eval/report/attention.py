"""The report's part on attention: maps, and the tables of a study that lies beside the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from dit_accel.eval import attention_maps, attention_study
from dit_accel.eval.attention_summary import summarise
from dit_accel.eval.attention_tables import Sheet, sheets
from dit_accel.eval.report import pictures

HEADS: Final = 8
"""Heads that are shown, the first ones."""


def told(folder: Path) -> list[Sheet] | None:
    """Tables of the study in a folder; ``None`` without one."""
    if not (folder / "settings.json").is_file():
        return None
    return sheets(summarise(attention_study.read(folder)))


def maps_of(folder: Path) -> dict[str, Any] | None:
    """Maps of every candidate, layer, step and head; ``None`` without any.

    One scale of errors serves everything of a layer, step and head, so that methods can be
    compared.
    """
    files = sorted((folder / "maps").glob("*.safetensors"))
    every = [one for path in files for one in attention_maps.load(path)]
    if not every:
        return None
    shown: dict[str, Any] = {}
    places = sorted({(one.layer, one.step) for one in every})
    for layer, step in places:
        here = [one for one in every if (one.layer, one.step) == (layer, step)]
        top = pictures.top_of(here)
        for one in here:
            for head in range(min(HEADS, one.kind.shape[0])):
                shown[f"{one.candidate}|{layer}|{step}|{head}"] = {
                    "kind": pictures.kinds_picture(one, head),
                    "error": pictures.errors_picture(one, head, top),
                    "shares": pictures.shares(one, head),
                    "top": top,
                    "row": float(one.row[head].float().mean()),
                    "blocks": list(one.kind.shape[1:]),
                    "branch": one.branch,
                }
    order = list(_candidates(folder, every))
    return {
        "candidates": order,
        "layers": sorted({layer for layer, _ in places}),
        "steps": sorted({step for _, step in places}),
        "heads": list(range(max(min(HEADS, one.kind.shape[0]) for one in every))),
        "kinds": list(attention_maps.KINDS),
        "palette": [f"rgb({r} {g} {b})" for r, g, b in pictures.PALETTE],
        "ramp": [
            f"rgb({r} {g} {b})" for r, g, b in (pictures.ramp_colour(i / 8) for i in range(9))
        ],
        "decades": pictures.DECADES,
        "maps": shown,
    }


def _candidates(folder: Path, every: list[attention_maps.Maps]) -> dict[str, None]:
    """Names in the order of the study."""
    known = dict.fromkeys(one.candidate for one in every)
    if (folder / "settings.json").is_file():
        listed = attention_study.read(folder).settings["candidates"]
        return dict.fromkeys([name for name in listed if name in known])
    return known
