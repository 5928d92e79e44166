"""The report of a sweep: one HTML file that needs no network, a function of the records alone."""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from daft_domainbed import __version__
from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.results.records import Run, Sweep, is_number, order_algorithms, read_sweep
from daft_domainbed.results.selection import IN, OUT
from daft_domainbed.results.statistics import mean
from daft_domainbed.results.tables import (
    NOTHING,
    SELECTION_WORDS,
    Number,
    Results,
    Row,
    Table,
    Teacher,
    average_datasets,
    build_results,
    lay_out,
    read_hparams,
    say_not_asked,
    trace_teachers,
)

if TYPE_CHECKING:
    from markupsafe import Markup

COLORS = 8  # as many as report.css has
# Of the training curves: lines of one algorithm, points of one line, points of one data set.
MOST_TRIALS, MOST_POINTS, MOST_POINTS_IN_ALL = 5, 60, 20_000


def write_report(input_dir: Path, output: Path) -> Path:
    """Write the report of a sweep (or of a single run) and return its path.

    Raises:
        UsageError: There is nothing to report on, or the file cannot be written.
        RunError: The disk is full.
    """
    html = render(build_results(read_sweep(input_dir)))
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        draft.write_bytes(html.encode(errors="replace"))
        draft.replace(output)
    except OSError as error:
        draft.unlink(missing_ok=True)
        kind = RunError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UsageError
        raise kind(f"cannot write the report to {output} ({error.strerror}); --output names another file.") from error
    return output


def render(results: Results) -> str:
    """Return the report as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = write_duration
    sweep = results.sweep
    runs = _RunList(sweep)
    sections = [
        {
            "name": dataset,
            "panels": [
                _describe_table(t, runs, number) for number, t in enumerate(results.tables) if t.dataset == dataset
            ],
            "curves": draw_curves(next(t for t in results.tables if t.dataset == dataset)),
        }
        for dataset in dict.fromkeys(table.dataset for table in results.tables)
    ]
    return environment.get_template("report.html").render(
        title=sweep.root.resolve().name,
        version=__version__,
        facts=_count(sweep),
        selections=SELECTION_WORDS,
        sections=sections,
        averages=[_describe_table(table, runs, -i) for i, table in enumerate(average_datasets(results), 1)],
        runs=[_describe_run(sweep, run, number) for number, run in enumerate(runs.runs.values())],
        costs=_add_up_costs(sweep),
        machines=_list_machines(sweep),
        missing=sweep.missing,
        environments=sweep.environments,
        notes=sweep.notes,
        has_plan=sweep.plan is not None,
    )


def _count(sweep: Sweep) -> list[tuple[str, str]]:
    jobs = len(sweep.plan.jobs) if sweep.plan else 0
    done = ("jobs done", f"{jobs - len(sweep.missing):,} of {jobs:,}") if jobs else ("runs", f"{len(sweep.runs):,}")
    records = sum(len(run.steps) for run in [*sweep.runs, *sweep.teachers.values()])
    return [
        done,
        ("data sets", f"{len({run.key.dataset for run in sweep.runs}):,}"),
        ("trials", f"{len({run.key.trial_seed for run in sweep.runs}):,}"),
        ("hyperparameter draws", f"{len({run.key.hparams_seed for run in sweep.runs}):,}"),
        ("records", f"{records:,}"),
    ]


# --- tables, and what is behind each number


class _RunList:
    """The runs behind the numbers, each to be described once."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.runs: dict[str, Run] = {}
        self._numbers: dict[str, int] = {}

    def number(self, run: Run) -> int:
        """Return a run's place in the list, which it and its teachers join."""
        for own in (run, *(teacher.run for teacher in trace_teachers(self.sweep, run))):
            if own and own.folder not in self._numbers:
                self._numbers[own.folder] = len(self.runs)
                self.runs[own.folder] = own
        return self._numbers[run.folder]


def _describe_table(table: Table, runs: _RunList, number: int) -> dict[str, Any]:
    """Everything the template shows of one table; `number` makes its anchors unique in the page."""
    words = SELECTION_WORDS[table.selection]
    if not table.is_asked:
        return {"selection": table.selection, "words": words, "not_asked": say_not_asked(table)}
    layout = lay_out(table)
    rows, details = [], []
    for i, line in enumerate(layout.lines):
        means = [*(cell.mean for cell in line.row.cells), line.row.average]
        behind = [*(cell.numbers for cell in line.row.cells), []]
        cells = []
        for j, (text, error, best, footnote) in enumerate(line.columns):
            anchor = f"n{number}-{i}-{j}" if behind[j] else ""
            cells.append(
                {"id": anchor, "value": means[j], "text": text, "error": error, "best": best, "footnote": footnote}
            )
            if anchor:
                title = f"{line.row.label} on {table.environments[j]}"
                numbers = [_describe_number(n, runs) for n in behind[j]]
                details.append({"id": anchor, "title": title, "text": f"{text} {error}", "numbers": numbers})
        rows.append({"label": line.row.algorithm, "role": line.row.role, "cells": cells})
    return {
        "selection": table.selection,
        "words": words,
        "not_asked": "",
        "columns": [*table.environments, "average"],
        "caption": layout.caption,
        "students": [row for row in rows if row["role"] == "student"],
        "teachers": [row for row in rows if row["role"] == "teacher"],
        "details": details,
        "footnotes": layout.footnotes,
        "pairs": draw_teachers_and_students(table, runs.sweep) if table.dataset != "Averages" else "",
    }


def _describe_number(number: Number, runs: _RunList) -> dict[str, Any]:
    run, teacher = number.choice.run, number.teacher
    student = runs.number(run)
    shown = teacher.run if teacher else run
    return {
        "accuracy": f"{number.accuracy:.2f}",
        "trial_seed": run.key.trial_seed,
        "hparams_seed": run.key.hparams_seed,
        "step": teacher.last_step if teacher else number.choice.step,
        "chosen_by": f"{100 * number.choice.val_acc:.2f}",
        "student": f"{run.key.algorithm}, hparams_seed {run.key.hparams_seed}" if teacher else "",
        "folder": shown.folder if shown else teacher.id if teacher else "",
        "run": (runs.number(shown) if shown is not run else student) if shown else None,
    }


def _describe_run(sweep: Sweep, run: Run, number: int) -> dict[str, Any]:
    names = sweep.environments[run.key.dataset]
    return {
        "id": f"run{number}",
        "folder": run.folder,
        "key": run.key,
        "is_teacher": sweep.teachers.get(Path(run.folder).name) is run,
        "held_out": ", ".join(names[env] for env in run.key.test_envs),
        "command": write_command(run),
        "hparams": [(name, json.dumps(value)) for name, value in read_hparams(sweep, run).items()],
        "teachers": [_describe_teacher(teacher, run) for teacher in trace_teachers(sweep, run)],
        "seconds": write_duration(run.seconds),
        "machine": ", ".join(f"{name} {value}" for name, value in sorted(run.machine.items())),
    }


def _describe_teacher(teacher: Teacher, run: Run) -> dict[str, Any]:
    accs = {env: teacher.read_acc(env) for env in run.key.test_envs}
    return {
        "algorithm": teacher.algorithm,
        "id": teacher.id,
        "accuracy": ", ".join(f"{100 * acc:.2f}" for acc in accs.values() if acc is not None),
        "sha256": str(teacher.recorded.get("sha256", "")),
        "steps": teacher.recorded.get("steps"),
    }


def write_command(run: Run) -> str:
    """Write the command that trains a run, from its recorded arguments.

    A run that our engine recorded is ours to train; any other was trained by DomainBed's own script.
    """
    first = ["dataset", "algorithm", "test_envs", "trial_seed", "hparams_seed"]
    names = first + sorted(run.args.keys() - {*first})
    program = "daft-domainbed train" if "host" in run.args else "python -m domainbed.scripts.train"
    words = program.split()
    for name in names:
        value = run.args[name]
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        elif isinstance(value, dict):
            words += [f"--{name}", json.dumps(value)]
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


# --- cost, machines


def write_duration(seconds: float | None) -> str:
    """Write seconds for people.

    Example:
        >>> write_duration(3725.0), write_duration(75.2), write_duration(4.25)
        ('1 h 02 min', '1 min 15 s', '4.2 s')
    """
    if seconds is None:
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


class Cost(NamedTuple):
    """Training time of a stage: jobs, median and sum in seconds of those that recorded it, share of all in percent."""

    stage: str
    jobs: int
    median: float | None
    total: float | None
    share: float


def _add_up_costs(sweep: Sweep) -> list[Cost]:
    """Add up by stage; a teacher outside the sweep's own store counts once, as its students recorded it."""
    seconds: dict[str, dict[str, float | None]] = {}
    for run in sweep.teachers.values():
        seconds.setdefault(run.key.algorithm, {})[run.folder] = run.seconds
    for run in sweep.runs:
        for teacher in trace_teachers(sweep, run):
            recorded = teacher.recorded.get("seconds")
            if not teacher.run and is_number(recorded):
                seconds.setdefault(teacher.algorithm, {})[teacher.id] = float(recorded)
    stages = {f"{name} teacher": [*seconds[name].values()] for name in order_algorithms(None, seconds)}
    for name in order_algorithms(sweep.plan, (run.key.algorithm for run in sweep.runs)):
        stages[f"{name} student"] = [run.seconds for run in sweep.runs if run.key.algorithm == name]
    known = {stage: [value for value in values if value is not None] for stage, values in stages.items()}
    everything = sum(map(sum, known.values())) or 1.0
    return [
        Cost(
            stage,
            len(values),
            median(known[stage]) if known[stage] else None,
            sum(known[stage]) if known[stage] else None,
            100 * sum(known[stage]) / everything,
        )
        for stage, values in stages.items()
    ]


def _list_machines(sweep: Sweep) -> list[tuple[str, list[tuple[str, int]]]]:
    """Versions and hardware: of each recorded fact the values and how many runs have them."""
    machines = [run.machine for run in [*sweep.runs, *sweep.teachers.values()] if run.machine]
    facts: dict[str, Counter[str]] = {}
    for machine in machines:
        for name, value in machine.items():
            facts.setdefault(name, Counter())[str(value)] += 1
    return [
        (name, sorted(counts.items(), key=lambda item: (-item[1], item[0]))) for name, counts in sorted(facts.items())
    ]


# --- drawings: SVG by small functions, colours from report.css


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
    n_lines = sum(min(len(cell.numbers), MOST_TRIALS) for row in students for cell in row.cells)
    n_points = max(8, min(MOST_POINTS, MOST_POINTS_IN_ALL // max(1, 2 * n_lines)))

    def held_out(run: Run) -> np.ndarray:
        return run.accs[:, run.key.test_envs[0], IN]

    def training(run: Run) -> np.ndarray:
        return np.delete(run.accs[:, :, OUT], run.key.test_envs, axis=1).mean(axis=1)

    kinds = (("Held-out domain, in-split", held_out), ("Training domains, mean of the out-splits", training))
    charts: list[tuple[str, list[tuple[str, list[Curve]]]]] = []
    for title, read in kinds:
        panels = []
        for env, name in enumerate(table.environments):
            curves = []
            for color, row in enumerate(students):
                trials = [_thin_out(color, number, read, n_points) for number in row.cells[env].numbers[:MOST_TRIALS]]
                curves += [*trials, *_average_curves(trials, row.algorithm)]
            panels.append((name, curves))
        charts.append((title, panels))
    legend = [(row.algorithm, color % COLORS) for color, row in enumerate(students)]
    return [
        {"title": title, "legend": legend, "panels": _draw_panels(panels)}
        for title, panels in charts
        if any(curves for _, curves in panels)
    ]


def _thin_out(color: int, number: Number, read: Callable[[Run], np.ndarray], n_points: int) -> Curve:
    run, at = number.choice.run, number.choice.at
    kept = np.linspace(0, len(run.steps) - 1, min(len(run.steps), n_points)).round().astype(int)
    kept = np.union1d(kept, [at])
    label = f"{run.key.algorithm}, trial {run.key.trial_seed}, hparams_seed {run.key.hparams_seed}"
    return Curve(label, color, run.steps[kept], 100 * read(run)[kept], int(np.searchsorted(kept, at)))


def _average_curves(trials: Sequence[Curve], name: str) -> list[Curve]:
    """Average over trials, at the steps that all of them have; nothing to average of a single one."""
    if len(trials) < 2:
        return []
    steps = trials[0].steps
    for trial in trials[1:]:
        steps = np.intersect1d(steps, trial.steps)
    values = [trial.values[np.isin(trial.steps, steps)] for trial in trials]
    return [Curve(name, trials[0].color, steps, np.mean(values, axis=0), None)] if len(steps) else []


def _draw_panels(panels: Sequence[tuple[str, Sequence[Curve]]]) -> list[tuple[str, Markup]]:
    every = [curve for _, curves in panels for curve in curves]
    low, high = _round_range(value for curve in every for value in (curve.values.min(), curve.values.max()))
    last = max(int(curve.steps.max()) for curve in every) or 1
    return [(name, _draw_panel(curves, last, low, high)) for name, curves in panels]


def _round_range(values: Iterable[float]) -> tuple[int, int]:
    """Widen a range of percentages to tens."""
    found = list(values)
    low, high = int(min(found) // 10 * 10), int(-(-max(found) // 10) * 10)
    return (low, high) if high > low else (max(0, low - 10), high + 10)


def _draw_panel(curves: Sequence[Curve], last: int, low: int, high: int) -> Markup:
    left, right, top, bottom = 30, 292, 8, 138

    def x(step: float) -> float:
        return left + (right - left) * step / last

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    averaged = {curve.color for curve in curves if curve.at is None}
    parts = [_tag("title", "accuracy in percent over steps")]
    for tick in range(low, high + 1, 10 if high - low <= 40 else 20 if high - low <= 80 else 25):
        parts.append(_tag("path", class_="grid", d=f"M{left} {y(tick):.1f}H{right}"))
        parts.append(_tag("text", str(tick), class_="tick", x=left - 5, y=y(tick) + 3.5, text_anchor="end"))
    for step, anchor in ((0, "start"), (last, "end")):
        parts.append(_tag("text", f"step {step:,}", class_="tick", x=x(step), y=bottom + 14, text_anchor=anchor))
    for curve in curves:
        color = f"c{curve.color % COLORS}" + (" again" if curve.color >= COLORS else "")
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in zip(curve.steps, curve.values, strict=True))
        is_thin = curve.at is not None and curve.color in averaged
        told = _tag("title", curve.name)
        parts.append(_tag("path", told, class_=f"{'trial' if is_thin else 'line'} {color}", d=f"M{path}"))
        if curve.at is not None:
            step, value = curve.steps[curve.at], curve.values[curve.at]
            told = _tag("title", f"{curve.name}: {value:.1f} at the chosen step {step}")
            parts.append(_tag("circle", told, class_=f"dot {color}", cx=x(step), cy=y(value), r=2.6))
    return _tag("svg", *parts, viewBox="0 0 300 158", role="img")


def draw_teachers_and_students(table: Table, sweep: Sweep) -> Markup | str:
    """Draw each student's mean beside the mean of the teachers behind it, by held-out domain; "" without teachers."""
    students = [row for row in table.rows if row.role == "student"]
    groups = [(name, _pair_up(students, env, sweep)) for env, name in enumerate(table.environments)]
    pairs = [pair for _, group in groups for pair in group]
    if all(pair.teacher is None for pair in pairs):
        return ""
    low, high = _round_range(value for pair in pairs for value in (pair.student, pair.teacher) if value is not None)
    left, right, line_height, gap = 130, 690, 20, 14
    bottom = gap + sum(line_height * len(group) + gap for _, group in groups)

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    parts = [_tag("title", "accuracy in percent of students and of the teachers behind them")]
    for tick in range(low, high + 1, 10 if high - low <= 60 else 20):
        parts.append(_tag("path", class_="grid", d=f"M{x(tick):.1f} 6V{bottom}"))
        parts.append(_tag("text", str(tick), class_="tick", x=x(tick), y=bottom + 16, text_anchor="middle"))
    y = 20
    for name, group in groups:
        parts.append(_tag("text", name, class_="group", x=0, y=y + 4))
        for pair in group:
            color, at = f"c{pair.color}", x(pair.student)
            parts.append(_tag("text", pair.algorithm, class_="tick", x=left - 10, y=y + 4, text_anchor="end"))
            if pair.teacher is not None:
                told = _tag("title", f"teacher of {pair.algorithm} on {name}: {pair.teacher:.1f}")
                diamond = f"M{x(pair.teacher):.1f} {y - 6}l6 6-6 6-6-6z"
                parts.append(_tag("path", class_=f"span {color}", d=f"M{at:.1f} {y}H{x(pair.teacher):.1f}"))
                parts.append(_tag("path", told, class_=f"teacher {color}", d=diamond))
            told = _tag("title", f"{pair.algorithm} on {name}: {pair.student:.1f}")
            parts.append(_tag("circle", told, class_=f"dot {color}", cx=at, cy=y, r=5.5))
            y += line_height
        y += gap
    return _tag("svg", *parts, viewBox=f"0 0 720 {bottom + 22}", role="img")


def _tag(name: str, *inside: str, **attributes: object) -> Markup:
    """Write an element; all that is not Markup is escaped, numbers get one decimal."""
    from markupsafe import Markup

    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), f"{v:.1f}" if isinstance(v, float) else v)
        for key, v in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(inside))


class Pair(NamedTuple):
    """A student's mean and that of the nearest teachers behind it, in percent."""

    algorithm: str
    color: int
    student: float
    teacher: float | None


def _pair_up(students: Sequence[Row], env: int, sweep: Sweep) -> list[Pair]:
    pairs = []
    for color, row in enumerate(students):
        cell = row.cells[env]
        if cell.mean is None:
            continue
        nearest = [next(iter(trace_teachers(sweep, number.choice.run)), None) for number in cell.numbers]
        accs = [100 * acc for teacher in nearest if teacher and (acc := teacher.read_acc(env)) is not None]
        pairs.append(Pair(row.algorithm, color % COLORS, cell.mean, mean(accs)))
    return pairs
