"""Small SVG charts of numbers with intervals, the same bytes wherever they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import ceil, floor
from typing import NamedTuple

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 420, 16, 252  # of the plotting area; names stand to its right
COLORS = ("#1f6feb", "#d1242f", "#2da44e", "#8250df", "#9a6700")  # legible on white and on black


class Point(NamedTuple):
    """A number with its 95 % interval, if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Series(NamedTuple):
    """Points of one kind; `is_line` joins them."""

    name: str
    points: Sequence[Point]
    is_line: bool = True


class Axis(NamedTuple):
    """A label, and the places of its ticks: in the points' unit, with what stands beside them."""

    label: str
    ticks: Sequence[tuple[float, str]]


def make_axis(label: str, values: Sequence[float], step: float) -> Axis:
    """Return an axis with a tick every `step` that holds all values.

    Example:
        >>> make_axis("points", [-0.3, 1.2], 1.0).ticks
        [(-1.0, '-1'), (0.0, '0'), (1.0, '1'), (2.0, '2')]
    """
    first, last = floor(min(values) / step), ceil(max(values) / step)
    return Axis(label, [(i * step, f"{i * step:g}") for i in range(first, max(last, first + 1) + 1)])


def draw_chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Return a chart as SVG text, without any script or style of elsewhere."""
    put_x, put_y = _scale(x, LEFT, RIGHT), _scale(y, BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12" fill="#6e7781">',
        f"<title>{escape(title)}</title>",
    ]
    for value, text in y.ticks:
        weight = 1.5 if value == 0 else 0.5
        parts.append(f'<path d="M{LEFT} {put_y(value)}H{RIGHT}" stroke="#8c959f" stroke-width="{weight}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{put_y(value)}" dy="4" text-anchor="end">{escape(text)}</text>')
    for value, text in x.ticks:
        parts.append(f'<text x="{put_x(value)}" y="{BOTTOM + 18}" text-anchor="middle">{escape(text)}</text>')
    middle = f"{(LEFT + RIGHT) / 2:.1f}", f"{(TOP + BOTTOM) / 2:.1f}"
    parts.append(f'<text x="{middle[0]}" y="{BOTTOM + 38}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(
        f'<text transform="translate(14 {middle[1]}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>'
    )
    for i, line in enumerate(series):
        color = COLORS[i % len(COLORS)]
        places = [(put_x(point.x), put_y(point.y)) for point in line.points]
        if line.is_line and len(places) > 1:
            path = "L".join(f"{left} {top}" for left, top in places)
            parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        for point, (left, top) in zip(line.points, places, strict=True):
            if point.low is not None and point.high is not None:
                span = f"M{left} {put_y(point.low)}V{put_y(point.high)}"
                parts.append(f'<path d="{span}" stroke="{color}" stroke-width="1.5"/>')
            parts.append(f'<circle cx="{left}" cy="{top}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{RIGHT + 14}" y="{TOP + 8 + 20 * i}" fill="{color}">{escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _scale(axis: Axis, start: float, end: float) -> Callable[[float], str]:
    low, high = axis.ticks[0][0], axis.ticks[-1][0]
    return lambda value: f"{start + (end - start) * (value - low) / (high - low):.1f}"
