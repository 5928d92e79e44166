"""Figures for a paper, SVG and PDF by matplotlib: domains, teachers and students, curves, gain against student size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daft_domainbed.errors import UsageError
from daft_domainbed.results.cells import Row, Table
from daft_domainbed.results.charts import collect_curves, pair_up, read_held_out
from daft_domainbed.results.comparison import FEWEST_TRIALS, collect_trials, compare_trials
from daft_domainbed.results.selection import SELECTION_WORDS
from daft_domainbed.results.statistics import bootstrap_mean, standard_error
from daft_domainbed.results.tables import Results
from daft_domainbed.runtime.sizes import read_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's (2008), which most colour-blind people can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INCH_A_PANEL, _HEIGHT = 1.9, 2.2
_SETTINGS: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "daft_domainbed",
    "pdf.fonttype": 42,
    "legend.frameon": False,
}


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Draw what a sweep's tables hold, and return the files.

    Raises:
        UsageError: matplotlib is missing, or there is nothing to draw.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("--figures needs matplotlib: pip install 'daft-domainbed[report]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with matplotlib.rc_context(_SETTINGS):
        for table in results.tables:
            for name, figure in _draw(results, table):
                files += _save(figure, folder / f"{_slug(table.name)}-{name}")
    if not files:
        raise UsageError("--figures: no held-out domain has a number yet")
    return files


def _draw(results: Results, table: Table) -> Iterator[tuple[str, Figure]]:
    students = [row for row in table.rows if row.role == "student"]
    if not table.is_asked or all(cell.mean is None for row in students for cell in row.cells):
        return
    yield f"{table.selection}-domains", _draw_domains(table, students)
    if figure := _draw_pairs(results, table, students):
        yield f"{table.selection}-teachers", figure
    yield f"{table.selection}-curves", _draw_curves(table, students)
    if figure := _draw_sizes(table, students):
        yield f"{table.selection}-sizes", figure


def _draw_domains(table: Table, students: Sequence[Row]) -> Figure:
    """Draw a bar for each student and held-out domain, and for the average."""
    has_intervals = table.n_trials >= FEWEST_TRIALS
    figure, (axis,) = _start(1, width=1.2 + 0.28 * (len(table.environments) + 1) * (len(students) + 1))
    width = 0.8 / len(students)
    for i, row in enumerate(students):
        lots = [*(cell.values for cell in row.cells), [float(np.mean(accs)) for accs in row.list_trials().values()]]
        known = [j for j, values in enumerate(lots) if values]
        for j in known:
            at, height = j + (i - (len(students) - 1) / 2) * width, float(np.mean(lots[j]))
            label = row.label if j == known[0] else None
            error = _get_error(lots[j], height, has_intervals)
            axis.bar(at, height, width, yerr=error, color=COLORS[i % len(COLORS)], label=label, error_kw={"lw": 0.8})
    axis.set_xticks(range(len(lots)), [*table.environments, "average"])
    spread = "95 % bootstrap interval" if has_intervals else "± standard error" if table.n_trials > 1 else "one trial"
    axis.set_ylabel(f"accuracy, percent\n({spread})")
    axis.set_title(f"{table.name}: {SELECTION_WORDS[table.selection].name}", fontsize=8)
    _add_legend(figure, [axis])
    return figure


def _get_error(values: Sequence[float], height: float, has_intervals: bool) -> np.ndarray | None:
    if has_intervals and len(values) >= FEWEST_TRIALS:
        low, high = bootstrap_mean(values)
        return np.array([[height - low], [high - height]])
    error = standard_error(values)
    return None if error is None else np.array([[error], [error]])


def _draw_pairs(results: Results, table: Table, students: Sequence[Row]) -> Figure | None:
    """Draw each student's mean against the mean of its teachers, a dot a held-out domain; None without teachers."""
    pairs = [pair for env in range(len(table.environments)) for pair in pair_up(students, env, results.sweep)]
    if not any(pair.teachers for pair in pairs):
        return None
    figure, (axis,) = _start(1, width=2.6)
    for i, row in enumerate(students):
        own = [
            (value, pair.student) for pair in pairs if pair.algorithm == row.label for value in pair.teachers.values()
        ]
        if own:
            axis.plot(*np.array(own).T, "o", ms=4, color=COLORS[i % len(COLORS)], label=row.label)
    limits = [*axis.get_xlim(), *axis.get_ylim()]
    low, high = min(limits), max(limits)
    axis.plot([low, high], [low, high], lw=0.6, color="0.5", zorder=0)
    axis.set(xlabel="teacher's accuracy, percent", ylabel="its student's", title=table.name)
    axis.legend()
    return figure


def _draw_curves(table: Table, students: Sequence[Row]) -> Figure:
    """Draw the accuracy on each held-out domain over steps, of the runs that were chosen; thin lines are trials."""
    figure, axes = _start(len(table.environments), sharey=True)
    for env, (name, axis) in enumerate(zip(table.environments, axes, strict=True)):
        curves = collect_curves(students, env, read_held_out)
        averaged = {curve.color for curve in curves if curve.at is None}
        for curve in curves:
            is_thin = curve.at is not None and curve.color in averaged
            label = None if is_thin else students[curve.color].label
            color = COLORS[curve.color % len(COLORS)]
            axis.plot(curve.steps, curve.values, lw=0.5 if is_thin else 1.4, alpha=0.6 if is_thin else 1, color=color,
                      label=label)  # fmt: skip
            if curve.at is not None:
                axis.plot(curve.steps[curve.at], curve.values[curve.at], "o", ms=2.5, color=color)
        axis.set(title=name, xlabel="step")
    axes[0].set_ylabel("accuracy, percent")
    _add_legend(figure, axes)
    return figure


def _draw_sizes(table: Table, students: Sequence[Row]) -> Figure | None:
    """Draw the last algorithm's gain over each other against the size of their students; None where there is one."""
    last, by_size = students[-1].algorithm, _group_by_size(students)
    points: dict[str, list[tuple[int, float, float, float]]] = {}
    for size, rows in sorted(by_size.items()):
        for name in rows.keys() - {last} if last in rows else ():
            trials = [collect_trials(table, rows[algorithm].name) for algorithm in (last, name)]
            entry = compare_trials(table, last, name, trials[0], trials[1])
            if entry.gain is not None:
                low, high = entry.interval or (entry.gain, entry.gain)
                points.setdefault(name, []).append((size, entry.gain, low, high))
    if max(map(len, points.values()), default=0) < 2:
        return None
    figure, (axis,) = _start(1)
    for color, (name, found) in zip(COLORS, sorted(points.items()), strict=False):
        x, gain, low, high = np.array(found).T
        axis.errorbar(x, gain, [gain - low, high - gain], fmt="o-", ms=3, capsize=2, color=color, label=name)
    axis.axhline(0, lw=0.6, color="0.5")
    axis.set(xscale="log", xlabel="parameters of the student", ylabel=f"gain of {last} over, points", title=table.name)
    axis.set_xticks([*by_size], [f"{size / 1e6:.2g} M" for size in by_size])
    axis.set_xticks([], minor=True)
    axis.legend()
    return figure


def _group_by_size(students: Sequence[Row]) -> dict[int, dict[str, Row]]:
    """Return the row of each algorithm by its network's parameters; of several rows of one size, the first."""
    by_size: dict[int, dict[str, Row]] = {}
    for row in students:
        sizes = {read_size(number.choice.run.first)[0] for cell in row.cells for number in cell.numbers}
        if len(sizes) == 1 and (size := sizes.pop()):
            by_size.setdefault(size, {}).setdefault(row.algorithm, row)
    return by_size


def _start(n_panels: int, width: float | None = None, **kwargs: Any) -> tuple[Figure, Sequence[Any]]:
    """Return a figure that needs no display, and its panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width or max(2.6, _INCH_A_PANEL * n_panels), _HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.ravel(figure.subplots(1, n_panels, **kwargs)))


def _add_legend(figure: Figure, axes: Sequence[Any]) -> None:
    """Name the rows that any axis shows below the figure, in as many columns as fit."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels, handles = list(found), list(found.values())
    columns = max(1, int(figure.get_figwidth() / (0.55 + 0.06 * max(map(len, labels)))))  # inches
    n_lines = -(-len(labels) // columns)
    figure.set_figheight(_HEIGHT + 0.16 * (n_lines - 1))
    figure.legend(handles, labels, ncols=min(columns, len(labels)), loc="outside lower center")


def _save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure twice, with no time in it: equal records give equal files."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "pdf")]
    figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], metadata={"CreationDate": None, "ModDate": None})
    return files


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name.removeprefix("folder:")).strip("_") or "data"
