"""Numbers as the report writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dit_accel.eval.figures import Figure, Measure

_DIGITS = {
    "dB": 2,
    "×": 2,
    "MiB": 0,
    "s": 2,
    "TFLOP": 3,
}
_PERCENT = {"colour", "shape", "motion", "all_three", "spatial_relation", "dynamic_degree"}


def number(value: float, measure: Measure | None = None) -> str:
    """A number with as many digits as its unit is worth; true minus signs."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if math.isnan(value):
        return "?"
    if measure is not None and measure.name in _PERCENT:
        return f"{value:.1%}"
    if measure is not None and measure.unit in _DIGITS:
        text = f"{value:,.{_DIGITS[measure.unit]}f}"
    elif measure is not None and measure.name == "density":
        text = f"{value:.3f}"
    elif value and abs(value) < 1e-3:
        text = f"{value:.2g}"
    else:
        text = f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"
    return text.replace("-", "−")


def interval(figure: Figure, measure: Measure | None = None) -> str:
    """``29.8–32.1``; empty without one."""
    if figure.low is None or figure.high is None:
        return ""
    return f"{number(figure.low, measure)}–{number(figure.high, measure)}"


def with_unit(value: float, measure: Measure) -> str:
    """A number and its unit; a factor stands close."""
    text = number(value, measure)
    if measure.name in _PERCENT or not measure.unit:
        return text
    return f"{text}×" if measure.unit == "×" else f"{text} {measure.unit}"


def setting(options: Mapping[str, object]) -> str:
    """Options in a line: ``density 0.15, block size 16``; what is not set is left out."""
    shown = []
    for name, value in options.items():
        if value is None or value in ((), [], {}, False, 0):
            continue
        text = "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
        shown.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(shown)
