"""Small SVG charts of numbers with intervals, the same bytes wherever they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor
from typing import NamedTuple

from daft_domainbed.results.svg import Svg, write_element

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 420, 16, 252  # of the plotting area; names stand to its right
COLORS = ("#1f6feb", "#d1242f", "#2da44e", "#8250df", "#9a6700")  # legible on white and on black

Scale = Callable[[float], str]  # where a value stands


class Point(NamedTuple):
    """A number with its 95 % interval, if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Series(NamedTuple):
    """Points of one kind, which `is_line` joins."""

    name: str
    points: Sequence[Point]
    is_line: bool = True


class Axis(NamedTuple):
    """A label, and its ticks: their places in the points' unit, with what stands beside them."""

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


def fit_axis(label: str, series: Sequence[Series], step: float) -> Axis:
    """Return an axis that holds 0 and all points of some series with their intervals.

    Example:
        >>> fit_axis("points", [Series("a", [Point(0, 0.4, -1.2, 0.9)])], 1.0).ticks[0]
        (-2.0, '-2')
    """
    ends = [end for line in series for point in line.points for end in (point.y, point.low, point.high)]
    return make_axis(label, [0.0, *(end for end in ends if end is not None)], step)


def draw_chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Return a chart as the text of an SVG file, without any script or style of elsewhere."""
    put_x, put_y = _scale(x, LEFT, RIGHT), _scale(y, BOTTOM, TOP)
    parts = [write_element("title", title), *_draw_axes(x, y, put_x, put_y)]
    for i, line in enumerate(series):
        color = COLORS[i % len(COLORS)]
        parts += _draw_series(line, color, put_x, put_y)
        parts.append(write_element("text", line.name, x=RIGHT + 14, y=TOP + 8 + 20 * i, fill=color))
    lines = Svg("\n").join(["", *parts, ""])
    font = {"font_family": "sans-serif", "font_size": 12, "fill": "#6e7781"}
    xmlns = "http://www.w3.org/2000/svg"
    return write_element("svg", Svg(lines), xmlns=xmlns, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", **font) + "\n"


def _draw_axes(x: Axis, y: Axis, put_x: Scale, put_y: Scale) -> list[Svg]:
    parts = []
    for value, text in y.ticks:
        weight = 1.5 if value == 0 else 0.5
        d = f"M{LEFT} {put_y(value)}H{RIGHT}"
        parts.append(write_element("path", d=d, stroke="#8c959f", stroke_width=weight))
        parts.append(write_element("text", text, x=LEFT - 8, y=put_y(value), dy=4, text_anchor="end"))
    for value, text in x.ticks:
        parts.append(write_element("text", text, x=put_x(value), y=BOTTOM + 18, text_anchor="middle"))
    middle_x, middle_y = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    parts.append(write_element("text", x.label, x=middle_x, y=BOTTOM + 38, text_anchor="middle"))
    turned = f"translate(14 {middle_y:.1f}) rotate(-90)"
    return [*parts, write_element("text", y.label, transform=turned, text_anchor="middle")]


def _draw_series(line: Series, color: str, put_x: Scale, put_y: Scale) -> list[Svg]:
    parts = []
    places = [(put_x(point.x), put_y(point.y)) for point in line.points]
    if line.is_line and len(places) > 1:
        path = "L".join(f"{left} {top}" for left, top in places)
        parts.append(write_element("path", d=f"M{path}", fill="none", stroke=color, stroke_width=1.5))
    for point, (left, top) in zip(line.points, places, strict=True):
        if point.low is not None and point.high is not None:
            span = f"M{left} {put_y(point.low)}V{put_y(point.high)}"
            parts.append(write_element("path", d=span, stroke=color, stroke_width=1.5))
        parts.append(write_element("circle", cx=left, cy=top, r=4, fill=color))
    return parts


def _scale(axis: Axis, start: float, end: float) -> Scale:
    low, high = axis.ticks[0][0], axis.ticks[-1][0]
    return lambda value: f"{start + (end - start) * (value - low) / (high - low):.1f}"
