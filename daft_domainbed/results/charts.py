"""The drawings of the report: training curves, and students beside their teachers. SVG, with colors from report.css."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from daft_domainbed.results.cells import Number, Row, Table
from daft_domainbed.results.lineage import trace_teachers
from daft_domainbed.results.records import Run
from daft_domainbed.results.selection import IN, OUT
from daft_domainbed.results.statistics import mean
from daft_domainbed.results.svg import Svg, write_element
from daft_domainbed.results.sweeps import Sweep

COLORS = 8  # as many as report.css has

# Of the training curves: lines of one algorithm, points of one line, points of one data set.
MOST_TRIALS, MOST_POINTS, MOST_POINTS_IN_ALL = 5, 60, 20_000

ReadCurve = Callable[[Run, int], np.ndarray]  # of a run and a held-out domain: fractions, [C]


class Curve(NamedTuple):
    """A line of a chart: its points (step, percent) and, of a single run, which of them is the chosen checkpoint."""

    name: str
    color: int
    steps: np.ndarray
    values: np.ndarray
    at: int | None


def draw_curves(table: Table) -> list[dict[str, Any]]:
    """Draw a data set's training curves, a chart a held-out domain, of the runs that the table's selection chose."""
    students = [row for row in table.rows if row.role == "student"]
    legend = [(row.label, color % COLORS) for color, row in enumerate(students)]
    charts: list[dict[str, Any]] = []
    for title, read in _CURVES.items():
        panels = [(name, collect_curves(students, env, read)) for env, name in enumerate(table.environments)]
        if any(curves for _, curves in panels):
            charts.append({"title": title, "legend": legend, "panels": _draw_panels(panels)})
    return charts


def read_held_out(run: Run, env: int) -> np.ndarray:
    """Return a run's accuracy on a held-out domain's in-split, a fraction a checkpoint."""
    return run.accs[:, env, IN]


def _read_training(run: Run, env: int) -> np.ndarray:
    return np.delete(run.accs[:, :, OUT], run.key.test_envs, axis=1).mean(axis=1)


_CURVES: dict[str, ReadCurve] = {
    "Held-out domain, in-split": read_held_out,
    "Training domains, mean of the out-splits": _read_training,
}


def collect_curves(students: Sequence[Row], env: int, read: ReadCurve) -> list[Curve]:
    """Collect the curves of a panel: of each algorithm its trials, then their mean."""
    n_lines = sum(min(len(cell.numbers), MOST_TRIALS) for row in students for cell in row.cells)
    n_points = max(8, min(MOST_POINTS, MOST_POINTS_IN_ALL // max(1, 2 * n_lines)))
    curves = []
    for color, row in enumerate(students):
        trials = [_thin_out(color, number, read, env, n_points) for number in row.cells[env].numbers[:MOST_TRIALS]]
        curves += [*trials, *_average_curves(trials, row.label)]
    return curves


def _thin_out(color: int, number: Number, read: ReadCurve, env: int, n_points: int) -> Curve:
    run, at = number.choice.run, number.choice.at
    kept = np.linspace(0, len(run.steps) - 1, min(len(run.steps), n_points)).round().astype(int)
    kept = np.union1d(kept, [at])
    label = f"{run.key.algorithm}, trial {run.key.trial_seed}, hparams_seed {run.key.hparams_seed}"
    return Curve(label, color, run.steps[kept], 100 * read(run, env)[kept], int(np.searchsorted(kept, at)))


def _average_curves(trials: Sequence[Curve], name: str) -> list[Curve]:
    """Average over two or more trials, at the steps that all of them have."""
    if len(trials) < 2:
        return []
    steps = trials[0].steps
    for trial in trials[1:]:
        steps = np.intersect1d(steps, trial.steps)
    values = [trial.values[np.isin(trial.steps, steps)] for trial in trials]
    return [Curve(name, trials[0].color, steps, np.mean(values, axis=0), None)] if len(steps) else []


def _draw_panels(panels: Sequence[tuple[str, Sequence[Curve]]]) -> list[tuple[str, Svg]]:
    every = [curve for _, curves in panels for curve in curves]
    low, high = _round_range(value for curve in every for value in (curve.values.min(), curve.values.max()))
    last = max(int(curve.steps.max()) for curve in every) or 1
    return [(name, _draw_panel(curves, last, low, high)) for name, curves in panels]


def _round_range(values: Iterable[float]) -> tuple[int, int]:
    """Widen a range of percentages to tens."""
    found = list(values)
    low, high = int(min(found) // 10 * 10), int(-(-max(found) // 10) * 10)
    return (low, high) if high > low else (max(0, low - 10), high + 10)


def _draw_panel(curves: Sequence[Curve], last: int, low: int, high: int) -> Svg:
    left, right, top, bottom = 30, 292, 8, 138

    def x(step: float) -> float:
        return left + (right - left) * step / last

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    averaged = {curve.color for curve in curves if curve.at is None}
    parts = [write_element("title", "accuracy in percent over steps")]
    for tick in range(low, high + 1, 10 if high - low <= 40 else 20 if high - low <= 80 else 25):
        parts.append(write_element("path", "", class_="grid", d=f"M{left} {y(tick):.1f}H{right}"))
        parts.append(write_element("text", str(tick), class_="tick", x=left - 5, y=y(tick) + 3.5, text_anchor="end"))
    for step, anchor in ((0, "start"), (last, "end")):
        at = {"x": x(step), "y": bottom + 14, "text_anchor": anchor}
        parts.append(write_element("text", f"step {step:,}", class_="tick", **at))
    for curve in curves:
        color = f"c{curve.color % COLORS}" + (" again" if curve.color >= COLORS else "")
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in zip(curve.steps, curve.values, strict=True))
        is_thin = curve.at is not None and curve.color in averaged
        told = write_element("title", curve.name)
        parts.append(write_element("path", told, class_=f"{'trial' if is_thin else 'line'} {color}", d=f"M{path}"))
        if curve.at is not None:
            step, value = curve.steps[curve.at], curve.values[curve.at]
            told = write_element("title", f"{curve.name}: {value:.1f} at the chosen step {step}")
            parts.append(write_element("circle", told, class_=f"dot {color}", cx=x(step), cy=y(value), r=2.6))
    return write_element("svg", *parts, viewBox="0 0 300 158", role="img")


class Pair(NamedTuple):
    """A student's mean, in percent, and that of its own teachers, by slot."""

    algorithm: str
    color: int
    student: float
    teachers: dict[str, float]


def draw_teachers_and_students(table: Table, sweep: Sweep) -> Svg:
    """Draw each student's mean beside the mean of its teachers, by held-out domain; nothing without teachers."""
    students = [row for row in table.rows if row.role == "student"]
    groups = [(name, pair_up(students, env, sweep)) for env, name in enumerate(table.environments)]
    pairs = [pair for _, group in groups for pair in group]
    if not any(pair.teachers for pair in pairs):
        return Svg()
    low, high = _round_range(value for pair in pairs for value in (pair.student, *pair.teachers.values()))
    left, right, line_height, gap = 130, 690, 20, 14
    bottom = gap + sum(line_height * len(group) + gap for _, group in groups)

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    parts = [write_element("title", "accuracy in percent of students and of the teachers behind them")]
    for tick in range(low, high + 1, 10 if high - low <= 60 else 20):
        parts.append(write_element("path", "", class_="grid", d=f"M{x(tick):.1f} 6V{bottom}"))
        parts.append(write_element("text", str(tick), class_="tick", x=x(tick), y=bottom + 16, text_anchor="middle"))
    y = 20
    for name, group in groups:
        parts.append(write_element("text", name, class_="group", x=0, y=y + 4))
        for pair in group:
            parts.append(write_element("text", pair.algorithm, class_="tick", x=left - 10, y=y + 4, text_anchor="end"))
            parts += _draw_pair(pair, name, x, y)
            y += line_height
        y += gap
    return write_element("svg", *parts, viewBox=f"0 0 720 {bottom + 22}", role="img")


def _draw_pair(pair: Pair, env: str, x: Callable[[float], float], y: int) -> list[Svg]:
    """Draw a student as a dot, each teacher as a diamond, and the span between them."""
    color, at = f"c{pair.color}", x(pair.student)
    parts = []
    for slot, accuracy in pair.teachers.items():
        told = write_element("title", f"{slot} of {pair.algorithm} on {env}: {accuracy:.1f}")
        diamond = f"M{x(accuracy):.1f} {y - 6}l6 6-6 6-6-6z"
        parts.append(write_element("path", "", class_=f"span {color}", d=f"M{at:.1f} {y}H{x(accuracy):.1f}"))
        parts.append(write_element("path", told, class_=f"teacher {color}", d=diamond))
    told = write_element("title", f"{pair.algorithm} on {env}: {pair.student:.1f}")
    return [*parts, write_element("circle", told, class_=f"dot {color}", cx=at, cy=y, r=5.5)]


def pair_up(students: Sequence[Row], env: int, sweep: Sweep) -> list[Pair]:
    """Return each student's mean on a held-out domain, with those of its own teachers."""
    pairs = []
    for color, row in enumerate(students):
        cell = row.cells[env]
        if cell.mean is None:
            continue
        accs: dict[str, list[float]] = {}
        for number in cell.numbers:
            for teacher in trace_teachers(sweep, number.choice.run):
                if teacher.generation == 1 and (acc := teacher.read_acc(env)) is not None:
                    accs.setdefault(teacher.slot, []).append(100 * acc)
        means = {slot: value for slot, values in accs.items() if (value := mean(values)) is not None}
        pairs.append(Pair(row.label, color % COLORS, cell.mean, means))
    return pairs
