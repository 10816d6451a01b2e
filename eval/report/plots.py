"""The report's drawings, as SVG; colours are the page's own, by class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from dit_accel.eval.figures import Figure, Measure
from dit_accel.eval.report.answers import frontier
from dit_accel.eval.report.text import interval, with_unit

_WIDTH, _HEIGHT = 440, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 30, 40


@dataclass(frozen=True, slots=True)
class Point:
    """One variant in a plot; ``colour`` is the number of its method."""

    name: str
    label: str
    colour: int
    x: Figure
    y: Figure


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axis:
    """Data to pixels. Better is always further from ``start``."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, falling: bool) -> None:
        low, high = min(values), max(values)
        pad = 0.08 * (high - low) or max(abs(high), 1e-6) * 0.05
        self.low, self.high = low - pad, high + pad
        self._start, self._end = (end, start) if falling else (start, end)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    @property
    def ticks(self) -> list[float]:
        return ticks(self.low, self.high)


def pareto(
    points: Sequence[Point], x: Measure, y: Measure, floor: Figure | None, *, x_falls: bool
) -> str:
    """Fidelity against cost, the frontier drawn. Up and to the right is better in every plot.

    Args:
        points: finite ones.
        x, y: what the axes are.
        floor: noise floor on the y axis.
        x_falls: whether less of x is better, and stands on the right.
    """
    y_falls = y.better == "lower"
    xs = [v for p in points for v in _span(p.x)] + ([1.0] if x.name == "speedup" else [])
    ys = [v for p in points for v in _span(p.y)]
    reach = (max(ys) - min(ys)) or max(map(abs, ys))
    floor_fits = (
        floor is not None
        and math.isfinite(floor.value)
        and min(ys) - reach <= floor.value <= max(ys) + reach
    )
    if floor is not None and floor_fits:
        ys.append(floor.value)
    across = _Axis(xs, _LEFT, _WIDTH - _RIGHT, falling=x_falls)
    up = _Axis(ys, _HEIGHT - _BOTTOM, _TOP, falling=y_falls)
    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(y.title)} against {escape(x.title)}">'
    ]
    for value in across.ticks:
        at = across(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" '
                     f'y2="{_HEIGHT - _BOTTOM}"/>')  # fmt: skip
        parts.append(f'<text class="tick" x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
                     f'text-anchor="middle">{_tick(value, x)}</text>')  # fmt: skip
    for value in up.ticks:
        at = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" '
                     f'y2="{at:.1f}"/>')  # fmt: skip
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" '
                     f'text-anchor="end">{_tick(value, y)}</text>')  # fmt: skip
    unit = f", {y.unit}" if y.unit else ""
    parts.append(f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">'
                 f"{escape(x.title)}{', less is right' if x_falls else ''} →</text>")  # fmt: skip
    parts.append(f'<text class="axis" x="4" y="12">↑ {escape(y.title)}{unit}'
                 f"{', less is up' if y_falls else ''}</text>")  # fmt: skip
    if x.name == "speedup":
        at = across(1.0)
        parts.append(f'<line class="ref" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" '
                     f'y2="{_HEIGHT - _BOTTOM}"/><text class="note" x="{at + 4:.1f}" '
                     f'y="{_HEIGHT - _BOTTOM - 6}">dense</text>')  # fmt: skip
    if floor is not None:
        told = f"noise floor {with_unit(floor.value, y)}"
        if floor_fits:
            at = up(floor.value)
            parts.append(f'<line class="ref" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" '
                         f'y2="{at:.1f}"/><text class="note" x="{_WIDTH - _RIGHT - 4}" '
                         f'y="{at - 5:.1f}" text-anchor="end">{told}</text>')  # fmt: skip
        else:
            parts.append(f'<text class="note" x="{_WIDTH - _RIGHT - 4}" y="12" '
                         f'text-anchor="end">{told} ↑</text>')  # fmt: skip
    signs = [(-p.x.value if x_falls else p.x.value, -p.y.value if y_falls else p.y.value)
             for p in points]  # fmt: skip
    best = frontier(signs)
    if len(best) > 1:
        ends = [(across(points[i].x.value), up(points[i].y.value)) for i in best]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in ends)
        parts.append(f'<polyline class="frontier" points="{path}"/>')
    labels = _placed([(across(p.x.value), up(p.y.value), p.label) for p in points])
    for i, point in enumerate(points):
        parts += _point(point, across, up, x, y, labels[i], i in best)
    return "".join(parts) + "</svg>"


def _span(figure: Figure) -> list[float]:
    ends = [figure.value, figure.low, figure.high]
    return [value for value in ends if value is not None and math.isfinite(value)]


def _tick(value: float, measure: Measure) -> str:
    text = f"{value:g}".replace("-", "−")
    return f"{text}×" if measure.unit == "×" else text


def _point(
    point: Point,
    across: _Axis,
    up: _Axis,
    x: Measure,
    y: Measure,
    label: tuple[float, float, str],
    best: bool,
) -> list[str]:
    cx, cy = across(point.x.value), up(point.y.value)
    told = f"{point.name}: {_told(point.y, y)}; {_told(point.x, x)}"
    drawn = [f'<g class="point m{point.colour}{"" if best else " beaten"}" tabindex="0" '
             f'role="img" aria-label="{escape(told)}"><title>{escape(told)}</title>']  # fmt: skip
    for figure, axis, other, upright in ((point.x, across, cy, False), (point.y, up, cx, True)):
        if figure.low is None or figure.high is None:
            continue
        if not (math.isfinite(figure.low) and math.isfinite(figure.high)):
            continue
        a, b = axis(figure.low), axis(figure.high)
        ends = (f'x1="{other:.1f}" x2="{other:.1f}" y1="{a:.1f}" y2="{b:.1f}"' if upright
                else f'y1="{other:.1f}" y2="{other:.1f}" x1="{a:.1f}" x2="{b:.1f}"')  # fmt: skip
        drawn.append(f'<line class="bar" {ends}/>')
    drawn.append(marker(point.colour, cx, cy))
    lx, ly, anchor = label
    drawn.append(f'<text x="{lx:.1f}" y="{ly:.1f}" text-anchor="{anchor}">'
                 f"{escape(point.label)}</text></g>")  # fmt: skip
    return drawn


def _told(figure: Figure, measure: Measure) -> str:
    span = interval(figure, measure)
    between = f" ({span})" if span else ""
    return f"{measure.title} {with_unit(figure.value, measure)}{between}, n {figure.count}"


def marker(colour: int, cx: float, cy: float, size: float = 5) -> str:
    """A mark whose shape goes with its colour, for those who cannot tell colours apart."""
    s = size
    shapes = (
        f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{s}"/>',
        f'<rect x="{cx - s:.1f}" y="{cy - s:.1f}" width="{2 * s}" height="{2 * s}"/>',
        f'<path d="M{cx:.1f} {cy - s - 1:.1f} l{s + 1} {2 * s} h-{2 * s + 2} z"/>',
        f'<path d="M{cx:.1f} {cy - s - 2:.1f} l{s + 2} {s + 2} l-{s + 2} {s + 2} '
        f'l-{s + 2} -{s + 2} z"/>',
        f'<path d="M{cx:.1f} {cy + s + 1:.1f} l{s + 1} -{2 * s} h-{2 * s + 2} z"/>',
    )
    return shapes[colour % len(shapes)]


def _placed(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Places for labels beside points, moved down where they would lie on each other."""
    places: dict[int, tuple[float, float, str]] = {}
    taken: list[tuple[float, float, float]] = []
    for i in sorted(range(len(points)), key=lambda i: points[i][1]):
        x, y, label = points[i]
        width = 6.2 * len(label)
        right = x + 10 + width < _WIDTH - 2
        left = x + 10 if right else x - 10 - width
        at = y + 4
        while any(abs(at - b) < 12 and left < hi and lo < left + width for lo, hi, b in taken):
            at += 3
        taken.append((left, left + width, at))
        places[i] = (x + 10 if right else x - 10, at, "start" if right else "end")
    return [places[i] for i in range(len(points))]


def heatmap(cells: Mapping[int, Mapping[int, float]], name: str) -> str:
    """Density by layer (down) and step (across).

    Args:
        cells: by step, then by layer.
        name: of the variant.
    """
    steps = sorted(cells)
    layers = sorted({layer for row in cells.values() for layer in row})
    unit = 10
    width, height = unit * len(steps), unit * len(layers)
    parts = [f'<svg class="heat" viewBox="0 0 {width} {height}" preserveAspectRatio="none" '
             f'role="img" aria-label="{escape(name)}: density by layer and step">']  # fmt: skip
    for i, step in enumerate(steps):
        for j, layer in enumerate(layers):
            value = cells[step].get(layer)
            if value is None:
                continue
            parts.append(f'<rect x="{unit * i}" y="{unit * j}" width="{unit}" height="{unit}" '
                         f'fill-opacity="{max(0.02, value):.3f}"><title>step {step}, '
                         f"layer {layer}: {value:.3f}</title></rect>")  # fmt: skip
    return "".join(parts) + "</svg>"
