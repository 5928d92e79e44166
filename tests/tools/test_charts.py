"""Charts: where a number stands can be worked out by hand, and no text can break the file."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tools.charts import BOTTOM, LEFT, RIGHT, TOP, Axis, Point, Series, draw_chart, make_axis

SVG = "{http://www.w3.org/2000/svg}"
UNIT = Axis("", [(0.0, "0"), (1.0, "1"), (2.0, "2")])


def read(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def test_numbers_stand_where_their_axis_puts_them() -> None:
    drawing = read(draw_chart("", UNIT, UNIT, [Series("a", [Point(0, 0), Point(1, 1, 0.5, 2), Point(2, 2)])]))
    middle_x, middle_y = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    places = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in drawing.iter(f"{SVG}circle")]
    assert places == [(LEFT, BOTTOM), (middle_x, middle_y), (RIGHT, TOP)]
    spans = [path.get("d", "") for path in drawing.iter(f"{SVG}path") if "V" in path.get("d", "")]
    assert spans == [f"M{middle_x:.1f} {BOTTOM - (BOTTOM - TOP) / 4:.1f}V{TOP:.1f}"]


def test_only_lines_are_joined() -> None:
    points = [Point(0, 0), Point(1, 1)]
    for is_line in (True, False):
        drawing = read(draw_chart("", UNIT, UNIT, [Series("a", points, is_line)]))
        assert any("L" in path.get("d", "") for path in drawing.iter(f"{SVG}path")) == is_line


def test_text_is_escaped() -> None:
    name = 'a < b & "c"'
    drawing = read(draw_chart(name, Axis(name, UNIT.ticks), Axis(name, [(0, name), (1, name)]), [Series(name, [])]))
    assert [text.text for text in drawing.iter(f"{SVG}text")].count(name) == 5
    assert drawing.findtext(f"{SVG}title") == name


@pytest.mark.parametrize(
    ("values", "step", "ticks"),
    [
        ([0.2, 3.9], 2.0, [0, 2, 4]),
        ([5.0], 5.0, [5, 10]),
        ([-0.1, 0.1], 0.5, [-0.5, 0, 0.5]),
        ([40, 60], 10, [40, 50, 60]),
    ],
)
def test_an_axis_holds_all_values(values: list[float], step: float, ticks: list[float]) -> None:
    assert [value for value, _ in make_axis("", values, step).ticks] == ticks
