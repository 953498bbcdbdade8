"""Quality against time as SVG that follows the colours of the page around it: no script, no file, no library."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from fastgen.evaluation.measures import Point

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 16, 46
_SERIES = 8  # colours of the page, --s0 to --s7


def quality_plot(points: Sequence[Point], label: str) -> str:
    """An <svg> with score (percent, bars of one standard error) over seconds a picture, one colour a series; names
    show when the pointer rests on a point. Seconds are on a logarithmic axis when they span more than a factor 4.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("quality_plot: needs points")
    seconds = [point.seconds for point in points]
    logarithmic = min(seconds) > 0 and max(seconds) > 4 * min(seconds)
    place = math.log10 if logarithmic else float
    x_low, x_high = _padded([place(value) for value in seconds])
    tops = [100 * (point.score + (point.stderr or 0)) for point in points]
    bottoms = [100 * (point.score - (point.stderr or 0)) for point in points]
    y_low, y_high = _padded([*tops, *bottoms])
    y_low, y_high = max(y_low, 0.0), min(max(y_high, 1.0), 105.0)

    def x(value: float) -> float:
        return _LEFT + (place(value) - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (y_high - value) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    for value in _ticks(y_low, y_high):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    marks = _log_ticks(x_low, x_high) if logarithmic else _ticks(x_low, x_high)
    base = _HEIGHT - _BOTTOM
    for value in marks:
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{_TOP}" y2="{base}"/>')
        parts.append(f'<text class="tick" x="{x(value):.1f}" y="{base + 16}" text-anchor="middle">{value:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    scale = ", logarithmic" if logarithmic else ""
    parts.append(
        f'<text class="axis" x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">seconds a picture{scale}</text>'
    )
    parts.append(
        f'<text class="axis" transform="translate(14 {(_TOP + base) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(label)} (%)</text>"
    )
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.series, []).append(point)
    for number, group in enumerate(groups.values()):
        path = " ".join(f"{x(p.seconds):.1f},{y(100 * p.score):.1f}" for p in sorted(group, key=lambda p: p.seconds))
        if len(group) > 1:
            parts.append(f'<polyline class="path" style="color:{_color(number)}" points="{path}"/>')
        parts += [_mark(point, number, x, y) for point in group]
    return "".join([*parts, "</svg>"])


def _mark(point: Point, place: int, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """A point with its error and its name; series that share a colour differ in shape."""
    across, up = x(point.seconds), y(100 * point.score)
    error = "" if point.stderr is None else f" ± {100 * point.stderr:.1f}"
    title = html.escape(f"{point.name}: {100 * point.score:.1f}{error} %, {point.seconds:.3g} s")
    bar = ""
    if point.stderr:
        top, bottom = y(100 * (point.score + point.stderr)), y(100 * (point.score - point.stderr))
        bar = f'<line class="error" x1="{across:.1f}" x2="{across:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
    if place // _SERIES % 2:
        shape = f'<rect x="{across - 4:.1f}" y="{up - 4:.1f}" width="8" height="8"/>'
    else:
        shape = f'<circle cx="{across:.1f}" cy="{up:.1f}" r="4.5"/>'
    return f'<g class="point" style="color:{_color(place)}"><title>{title}</title>{bar}{shape}</g>'


def _color(place: int) -> str:
    return f"var(--s{place % _SERIES})"


def legend(points: Sequence[Point]) -> list[tuple[str, str, bool]]:
    """(colour, name, whether its points are squares) of every series, in the order of the plot."""
    names = dict.fromkeys(point.series for point in points)
    return [(_color(place), name, bool(place // _SERIES % 2)) for place, name in enumerate(names)]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    space = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - space, high + space


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 6)
    first = math.ceil(low / step)
    return [round(number * step, 10) for number in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; `low` and `high` are exponents."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [value for value in values if low <= math.log10(value) <= high]
