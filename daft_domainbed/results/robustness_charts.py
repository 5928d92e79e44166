"""The drawings of a sweep's evaluations, a panel a held-out domain: accuracy against budget, and reliability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from daft_domainbed.results.cells import Row, Table, get_run
from daft_domainbed.results.charts import COLORS
from daft_domainbed.results.records import Run
from daft_domainbed.results.robustness import format_radius, read_evaluation
from daft_domainbed.results.statistics import mean
from daft_domainbed.results.svg import Svg, write_element
from daft_domainbed.results.sweeps import Sweep
from daft_domainbed.results.values import as_dict, as_list, is_number

LEFT, RIGHT, TOP, BOTTOM = 30, 292, 8, 138

Points = list[tuple[float, float]]  # (place from 0 to 1, percent)
Read = Callable[[dict[str, Any], str], Points]  # from a model's json and the held-out domain's name


class Chart(NamedTuple):
    """A drawing for each held-out domain: how its lines are read, and what stands below them."""

    title: str
    read: Read
    ticks: Sequence[tuple[float, str]]


def draw_robustness(table: Table, sweep: Sweep) -> list[dict[str, Any]]:
    """Draw what is known of the runs behind a table, as `draw_curves` does; nothing where nothing was evaluated."""
    models = {
        (i, env): [model for run in _list_runs(row, env) if (model := read_evaluation(run))]
        for i, row in enumerate(table.rows)
        for env in range(len(table.environments))
    }
    shown = [i for i in range(len(table.rows)) if any(models[i, env] for env in range(len(table.environments)))]
    legend = [(table.rows[i].label, i % COLORS) for i in shown]
    drawn = []
    for chart in _list_charts(model for found in models.values() for model in found):
        panels = [
            (name, [(i, _average([chart.read(model, name) for model in models[i, env]])) for i in shown])
            for env, name in enumerate(table.environments)
        ]
        drawings = [
            (name, _draw_panel(chart, lines, table)) for name, lines in panels if any(points for _, points in lines)
        ]
        drawn.append({"title": chart.title, "legend": legend, "panels": drawings})
    return drawn


def _list_runs(row: Row, env: int) -> Iterator[Run]:
    for number in row.cells[env].numbers:
        run = get_run(number)
        if run is not None:
            yield run


def _list_charts(models: Iterator[dict[str, Any]]) -> Iterator[Chart]:
    """Yield a chart of each norm and attack that any model has, then the reliability diagrams."""
    known = list(models)
    curves = [curve for model in known for curve in map(as_dict, as_list(model.get("curves")))]
    grids = {(curve.get("norm"), curve.get("attack")): as_list(curve.get("eps")) for curve in curves}
    for (norm, attack), grid in grids.items():
        radii = [eps for eps in grid if is_number(eps)]
        ticks = [(i / max(1, len(radii) - 1), format_radius(eps)) for i, eps in enumerate(radii) if i % 3 == 0]
        title = f"Right under attack, by the radius in {norm} ({'exact' if attack == 'minimal' else attack})"
        yield Chart(title, _make_curve_reader(str(norm), str(attack)), ticks)
    if any(as_dict(model.get("calibration")).get("reliability") for model in known):
        ticks = [(share, f"{100 * share:.0f}") for share in (0, 0.25, 0.5, 0.75, 1)]
        yield Chart("Reliability of all examples: accuracy by confidence", _read_reliability, ticks)


def _make_curve_reader(norm: str, attack: str) -> Read:
    def read(model: dict[str, Any], env: str) -> Points:
        for curve in map(as_dict, as_list(model.get("curves"))):
            if (curve.get("env"), curve.get("norm"), curve.get("attack")) == (env, norm, attack):
                values = [value for value in as_list(curve.get("accuracy")) if is_number(value)]
                return [(i / max(1, len(values) - 1), value) for i, value in enumerate(values)]
        return []

    return read


def _read_reliability(model: dict[str, Any], env: str) -> Points:
    diagram = as_dict(as_dict(as_dict(model.get("calibration")).get("reliability")).get("before"))
    columns = zip(*(as_list(diagram.get(name)) for name in ("confidence", "accuracy", "count")), strict=False)
    return [(x, 100 * y) for x, y, n in columns if is_number(x) and is_number(y) and n]


def _average(lines: Sequence[Points]) -> Points:
    """Average lines of equal places; of unequal ones, as reliability diagrams are, the first stands for all."""
    lines = [line for line in lines if line]
    if not lines or len({tuple(x for x, _ in line) for line in lines}) > 1:
        return lines[0] if lines else []
    return [(x, mean([line[i][1] for line in lines]) or 0.0) for i, (x, _) in enumerate(lines[0])]


def _draw_panel(chart: Chart, lines: Sequence[tuple[int, Points]], table: Table) -> Svg:
    def x(place: float) -> float:
        return LEFT + (RIGHT - LEFT) * place

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * value / 100

    parts = [write_element("title", chart.title)]
    for tick in (0, 25, 50, 75, 100):
        parts.append(write_element("path", "", class_="grid", d=f"M{LEFT} {y(tick):.1f}H{RIGHT}"))
        parts.append(write_element("text", str(tick), class_="tick", x=LEFT - 5, y=y(tick) + 3.5, text_anchor="end"))
    for place, text in chart.ticks:
        parts.append(write_element("text", text, class_="tick", x=x(place), y=BOTTOM + 14, text_anchor="middle"))
    for i, points in lines:
        if points:
            path = "L".join(f"{x(place):.1f} {y(value):.1f}" for place, value in points)
            told = write_element("title", table.rows[i].label)
            parts.append(write_element("path", told, class_=f"line c{i % COLORS}", d=f"M{path}"))
    return write_element("svg", *parts, viewBox="0 0 310 158", role="img")
