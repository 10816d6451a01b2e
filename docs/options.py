"""Write what the pages of docs/methods say of options, deviations and combinations.

It stands between markers, and comes from the table of presets, so that it is never out of date:

    python docs/options.py

A test fails when a page is not what this writes.
"""

from __future__ import annotations

import re
from pathlib import Path

from dit_accel import combinations, presets
from dit_accel.cli.listing import _text

PAGES = Path(__file__).parent / "methods"


def options(preset: presets.Preset) -> str:
    """A table of a preset's options."""
    lines = ["| option | default | takes | what it does |", "|---|---|---|---|"]
    for option in preset.options.values():
        takes = option.type.replace("|", r"\|")
        lines.append(f"| `{option.name}` | `{_text(option.default)}` | {takes} | {option.help} |")
    if preset.inherits is not None:
        lines.append(f"| … | | | the options of the method that `{preset.inherits}` names |")
    return "\n".join(lines)


def deviations(preset: presets.Preset) -> str:
    """A list of where a preset differs from its paper."""
    return "\n".join(f"- {text}" for text in preset.deviations)


def combined() -> str:
    """A table of routes and rests, and the reasons of those that do not go together."""
    rows: dict[str, dict[str, str | None]] = {}
    for pair in combinations.table():
        rows.setdefault(pair.route, {})[pair.rest] = pair.reason
    rests = list(next(iter(rows.values())))
    reasons = {
        route: reason for route, cells in rows.items() for reason in cells.values() if reason
    }
    lines = ["| route | " + " | ".join(rests) + " |", "|---" * (len(rests) + 1) + "|"]
    for route, cells in rows.items():
        shown = ["yes" if reason is None else "no" for reason in cells.values()]
        lines.append(f"| {route} | " + " | ".join(shown) + " |")
    lines += ["", *(f"- {route}: {reason}." for route, reason in reasons.items())]
    return "\n".join(lines)


def filled(page: str, preset: presets.Preset | None) -> str:
    """A page with everything between its markers written anew.

    Raises:
        KeyError: there is a marker that nothing belongs to.
    """
    parts = {"combinations": combined()}
    if preset is not None:
        parts |= {"options": options(preset), "deviations": deviations(preset)}

    def write(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n\n{parts[found[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", write, page, flags=re.DOTALL)


def preset_of(path: Path) -> presets.Preset | None:
    """The method that a page is about; ``None`` for the index."""
    return None if path.stem == "README" else presets.get(path.stem)


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(filled(path.read_text(), preset_of(path)))
