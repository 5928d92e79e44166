"""Tables of a sweep: one for each data set and selection, students first, then the teachers behind them.

A student's number is the chosen checkpoint's accuracy on the in-split of the held-out domain. A teacher's is its own,
at its last record: the ERM teacher's row is the teacher behind the chosen KD student (else the one behind DAFT's AFT
teacher), the AFT teacher's row the one behind the chosen DAFT student. So the teachers' rows follow the selection, and
`hparams_seed` of a teacher's number is that of the student it stands behind.

Nothing here depends on when or where the sweep ran.
"""

from __future__ import annotations

import csv
import io
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from daft_domainbed.results.records import (
    Missing,
    Run,
    Sweep,
    as_dict,
    cut_sweep_path,
    is_number,
    is_printable,
    order_algorithms,
)
from daft_domainbed.results.selection import IN, SELECTIONS, Choice, choose, group_runs
from daft_domainbed.results.statistics import mean, standard_error

WIDTH = 100
NOTHING = "–"
MOST_TEACHERS = 8  # in a row behind one student: a bound for records that nest without end


class Words(NamedTuple):
    """A selection in words: its name and what it chooses."""

    name: str
    rule: str


SELECTION_WORDS = {
    "training-domain": Words(
        "training-domain validation",
        "the checkpoint with the best mean out-split accuracy over the training domains",
    ),
    "leave-one-domain-out": Words(
        "leave-one-domain-out cross-validation",
        "the step and hyperparameters that do best on training domains left out in turn",
    ),
    "oracle": Words(
        "test-domain validation (oracle)",
        "the last checkpoint; hyperparameters by the out-split of the held-out domain itself, so not a fair comparison",
    ),
}


class Teacher(NamedTuple):
    """A teacher behind a student: what the student recorded about it, and its own run where the sweep holds it."""

    algorithm: str
    id: str
    recorded: dict[str, Any]
    run: Run | None

    def read_acc(self, env: int) -> float | None:
        """Accuracy on an environment's in-split at its last record, a fraction."""
        recorded = as_dict(self.recorded.get("accuracies")).get(f"env{env}_in_acc")
        if is_number(recorded) and 0 <= recorded <= 1:
            return float(recorded)
        return float(self.run.accs[-1, env, IN]) if self.run and env < self.run.n_envs else None

    @property
    def last_step(self) -> int | None:
        """Step of its last record."""
        steps = self.recorded.get("steps")
        if type(steps) is int:
            return steps - 1
        return int(self.run.steps[-1]) if self.run else None


class Number(NamedTuple):
    """One trial's accuracy (percent) in a cell: the chosen student and, in a teacher's row, the teacher behind it."""

    accuracy: float
    choice: Choice
    teacher: Teacher | None


@dataclass(frozen=True)
class Cell:
    """A cell: `values` in percent, one a trial; `gap` says what is missing from it and why."""

    env: str
    values: list[float]
    numbers: list[Number]
    gap: str

    @property
    def mean(self) -> float | None:
        """Mean over trials; None where there is none."""
        return mean(self.values)

    @property
    def stderr(self) -> float | None:
        """Standard error over trials; None for fewer than two."""
        return standard_error(self.values)


@dataclass(frozen=True)
class Row:
    """The cells of one algorithm as "student" or "teacher"."""

    algorithm: str
    role: str
    cells: list[Cell]

    @property
    def label(self) -> str:
        """Its name where students and teachers stand in one table."""
        return self.algorithm if self.role == "student" else f"{self.algorithm} teacher"

    @property
    def average(self) -> float | None:
        """Mean over the held-out domains; None unless each has a value."""
        means = [cell.mean for cell in self.cells]
        return mean([m for m in means if m is not None]) if None not in means else None


@dataclass(frozen=True)
class Table:
    """One data set under one selection; `is_asked` is False where the sweep has no runs for this selection at all."""

    dataset: str
    selection: str
    environments: list[str]
    rows: list[Row]
    is_asked: bool

    @property
    def n_trials(self) -> int:
        """The most trials behind any cell."""
        return max((len(cell.values) for row in self.rows for cell in row.cells), default=0)

    def find_best(self) -> list[float | None]:
        """Best student's mean of each column, the average last; None where no student is better than another."""
        students = [row for row in self.rows if row.role == "student"]
        columns = [[row.cells[i].mean for row in students] for i in range(len(self.environments))]
        columns.append([row.average for row in students])
        values = [[value for value in column if value is not None] for column in columns]
        return [max(column) if len({*column}) > 1 else None for column in values]


@dataclass(frozen=True)
class Results:
    """All tables of a sweep and the sweep itself."""

    sweep: Sweep
    tables: list[Table]


def build_results(sweep: Sweep) -> Results:
    """Select and tabulate; data sets in the order the sweep was asked for them, else by alphabet."""
    asked = sweep.plan.args.get("datasets") if sweep.plan else None
    asked = asked if isinstance(asked, list) else []
    planned = {job.key.dataset for job in sweep.plan.jobs.values()} if sweep.plan else set()
    datasets = planned or {run.key.dataset for run in sweep.runs}
    ordered = sorted(datasets, key=lambda name: (asked.index(name) if name in asked else len(asked), name))
    return Results(sweep, [table for name in ordered for table in _DatasetTables(sweep, name).build()])


class _DatasetTables:
    """Builds the tables of one data set."""

    def __init__(self, sweep: Sweep, dataset: str) -> None:
        self.sweep = sweep
        self.dataset = dataset
        self.names = sweep.environments[dataset]
        jobs = [job for job in sweep.plan.jobs.values() if job.key.dataset == dataset] if sweep.plan else []
        runs = [run for run in sweep.runs if run.key.dataset == dataset]
        keys = [job.key for job in jobs if not job.is_teacher] or [run.key for run in runs]
        self.algorithms = order_algorithms(sweep.plan, (key.algorithm for key in keys))
        self.planned_teachers = {job.key.algorithm for job in jobs if job.is_teacher}
        self.trials = sorted({key.trial_seed for key in keys})
        self.has_pairs = any(len(key.test_envs) == 2 for key in keys)
        self.missing = [missing for missing in sweep.missing if missing.job.key.dataset == dataset]
        self.groups = group_runs(runs)

    def build(self) -> Iterator[Table]:
        for selection in SELECTIONS:
            choices = {
                (group.algorithm, group.test_env, group.trial_seed): choice
                for group, runs in self.groups.items()
                if group.trial_seed in self.trials and (choice := choose(selection, runs, group.test_env))
            }
            students = [self._build_student(selection, name, choices) for name in self.algorithms]
            teachers = [self._build_teacher(name, choices) for name in self._list_teachers(choices)]
            is_asked = self.has_pairs or selection != "leave-one-domain-out"
            yield Table(self.dataset, selection, self.names, students + teachers, is_asked)

    def _build_student(self, selection: str, algorithm: str, choices: Mapping[tuple[str, int, int], Choice]) -> Row:
        cells = []
        for env, name in enumerate(self.names):
            found = [choices[key] for trial in self.trials if (key := (algorithm, env, trial)) in choices]
            numbers = [Number(100 * choice.test_acc, choice, None) for choice in found]
            wanted = 2 if selection == "leave-one-domain-out" else 1
            missing = [
                m
                for m in self.missing
                if (m.job.is_teacher, m.job.key.algorithm) == (False, algorithm)
                and env in m.job.key.test_envs
                and len(m.job.key.test_envs) <= wanted
            ]
            why = "no run" if wanted == 1 else "no step that a run and all its pairs of held-out domains share"
            cells.append(self._make_cell(env, name, numbers, missing, why))
        return Row(algorithm, "student", cells)

    def _list_teachers(self, choices: Mapping[tuple[str, int, int], Choice]) -> list[str]:
        found = {teacher.algorithm for choice in choices.values() for teacher in trace_teachers(self.sweep, choice.run)}
        return order_algorithms(None, self.planned_teachers | found)

    def _build_teacher(self, algorithm: str, choices: Mapping[tuple[str, int, int], Choice]) -> Row:
        preferred = ["KD", "DAFT"]
        sources = sorted(self.algorithms, key=lambda name: preferred.index(name) if name in preferred else 2)
        cells = []
        for env, name in enumerate(self.names):
            found = (self._find_teacher(algorithm, env, trial, sources, choices) for trial in self.trials)
            missing = [
                m
                for m in self.missing
                if (m.job.is_teacher, m.job.key.algorithm, m.job.key.test_envs) == (True, algorithm, (env,))
            ]
            cells.append(self._make_cell(env, name, [n for n in found if n], missing, "no student of it is done"))
        return Row(algorithm, "teacher", cells)

    def _find_teacher(
        self, algorithm: str, env: int, trial: int, sources: list[str], choices: Mapping[tuple[str, int, int], Choice]
    ) -> Number | None:
        for source in sources:
            choice = choices.get((source, env, trial))
            for teacher in trace_teachers(self.sweep, choice.run) if choice else ():
                acc = teacher.read_acc(env)
                if choice and teacher.algorithm == algorithm and acc is not None:
                    return Number(100 * acc, choice, teacher)
        return None

    def _make_cell(self, env: int, name: str, numbers: list[Number], missing: list[Missing], why: str) -> Cell:
        by_reason: dict[str, list[str]] = {}
        for job, reason in missing:
            pair = [self.names[e] for e in job.key.test_envs if e != env and e < len(self.names)]
            where = f"trial {job.key.trial_seed}, hparams_seed {job.key.hparams_seed}"
            by_reason.setdefault(reason, []).append(where + "".join(f", with {other} held out too" for other in pair))
        explained = {job.key.trial_seed for job, _ in missing} | {n.choice.run.key.trial_seed for n in numbers}
        for trial in self.trials:
            if trial not in explained:
                by_reason.setdefault(why, []).append(f"trial {trial}")
        gap = "; ".join(f"{reason} ({_shorten(places)})" for reason, places in by_reason.items())
        return Cell(name, [number.accuracy for number in numbers], numbers, gap)


def _shorten(places: list[str], most: int = 3) -> str:
    rest = [f"and {len(places) - most} more"] if len(places) > most else []
    return "; ".join(places[:most] + rest)


def trace_teachers(sweep: Sweep, run: Run) -> list[Teacher]:
    """List the teachers behind a run, nearest first.

    They are read from the run's first record; where that has none (it is not our engine's), from the plan and the
    teachers' own folders.
    """
    found: list[Teacher] = []

    def follow(student: Run | None, recorded: dict[str, Any]) -> None:
        if recorded:
            teacher_id = PurePosixPath(str(recorded.get("path", ""))).name
            own = sweep.teachers.get(teacher_id)
            named = recorded.get("algorithm")
            algorithm = named if is_printable(named) else own.key.algorithm if own else "unknown"
            nearest = [(Teacher(algorithm, teacher_id, recorded, own), as_dict(recorded.get("teacher")))]
        else:
            job = sweep.plan.jobs.get(student.folder) if sweep.plan and student else None
            ids = (PurePosixPath(need).name for need in (job.needs if job else ()))
            owned = ((i, sweep.teachers[i]) for i in ids if i in sweep.teachers)
            nearest = [(Teacher(own.key.algorithm, i, {}, own), {}) for i, own in owned]
        for teacher, below in nearest:
            is_new = not any(teacher.id and teacher.id == other.id for other in found)
            if is_new and len(found) < MOST_TEACHERS:
                found.append(teacher)
                follow(teacher.run, below or (teacher.run.teacher if teacher.run else {}))

    follow(run, run.teacher)
    return found


def to_json(results: Results) -> dict[str, Any]:
    """Return the tables as plain data (schema 1): accuracies in percent, null where nothing can be said."""
    return {
        "schema": 1,
        "tables": [
            {
                "dataset": table.dataset,
                "selection": table.selection,
                "environments": table.environments,
                "rows": [_row_to_json(results.sweep, row) for row in table.rows],
            }
            for table in results.tables
        ],
        "missing": [
            {
                "dataset": job.key.dataset,
                "algorithm": job.key.algorithm,
                "test_envs": list(job.key.test_envs),
                "trial_seed": job.key.trial_seed,
                "hparams_seed": job.key.hparams_seed,
                "reason": f"teacher {PurePosixPath(job.folder).name}: {reason}" if job.is_teacher else reason,
            }
            for job, reason in results.sweep.missing
        ],
    }


def _row_to_json(sweep: Sweep, row: Row) -> dict[str, Any]:
    cells = [
        {
            "env": cell.env,
            "mean": cell.mean,
            "stderr": cell.stderr,
            "n": len(cell.values),
            "chosen": [_number_to_json(sweep, number) for number in cell.numbers],
        }
        for cell in row.cells
    ]
    return {"algorithm": row.algorithm, "role": row.role, "cells": cells, "average": row.average}


def _number_to_json(sweep: Sweep, number: Number) -> dict[str, Any]:
    run = number.teacher.run if number.teacher else number.choice.run
    return {
        "trial_seed": number.choice.run.key.trial_seed,
        "hparams_seed": number.choice.run.key.hparams_seed,
        "step": number.teacher.last_step if number.teacher else number.choice.step,
        "hparams": read_hparams(sweep, run) if run else None,
    }


def read_hparams(sweep: Sweep, run: Run) -> dict[str, Any]:
    """Return a run's hyperparameters by name; a path into the sweep is relative to it."""
    return {
        name: cut_sweep_path(value, sweep.root, run) if isinstance(value, str) else value
        for name, value in sorted(run.hparams.items())
    }


def average_datasets(results: Results) -> list[Table]:
    """Average over held-out domains, then tabulate data sets: for each selection that every data set was asked for.

    A data set's number is the mean over trials of the trial's average; a trial counts when it has every domain.
    """
    datasets = list(dict.fromkeys(table.dataset for table in results.tables))
    tables = []
    for selection in SELECTIONS if len(datasets) > 1 else ():
        parts = [table for table in results.tables if table.selection == selection]
        if not all(table.is_asked for table in parts):
            continue
        names = {
            role: [row.algorithm for table in parts for row in table.rows if row.role == role]
            for role in ("student", "teacher")
        }
        rows = [
            Row(name, role, [_average_row(table, name, role) for table in parts])
            for role in names
            for name in order_algorithms(results.sweep.plan if role == "student" else None, names[role])
        ]
        tables.append(Table("Averages", selection, datasets, rows, is_asked=True))
    return tables


def _average_row(table: Table, algorithm: str, role: str) -> Cell:
    row = next((row for row in table.rows if (row.algorithm, row.role) == (algorithm, role)), None)
    if row is None:
        return Cell(table.dataset, [], [], "not in this data set's sweep")
    by_trial: dict[int, list[float]] = {}
    for cell in row.cells:
        for number in cell.numbers:
            by_trial.setdefault(number.choice.run.key.trial_seed, []).append(number.accuracy)
    complete = [sum(accs) / len(accs) for _, accs in sorted(by_trial.items()) if len(accs) == len(row.cells)]
    gap = "some held-out domains are missing, see its table" if any(cell.gap for cell in row.cells) else ""
    return Cell(table.dataset, complete, [], gap)


# --- formats


class Line(NamedTuple):
    """A row ready for print: of each column (mean, ± standard error, is best, footnote number)."""

    row: Row
    columns: list[tuple[str, str, bool, str]]


class Layout(NamedTuple):
    """A table ready for print: title, caption, lines of students and teachers, footnotes, all as plain text."""

    table: Table
    title: str
    caption: str
    lines: list[Line]
    footnotes: list[str]


def lay_out(table: Table) -> Layout:
    """Write a table's numbers and number its footnotes."""
    best = table.find_best()
    places: dict[str, dict[str, list[str]]] = {}
    for row in table.rows:
        for cell in row.cells:
            if cell.gap:
                fewer = f" (n = {len(cell.values)})" if 0 < len(cell.values) < table.n_trials else ""
                places.setdefault(cell.gap, {}).setdefault(row.label, []).append(cell.env + fewer)
    footnotes = [
        "; ".join(f"{label} on {', '.join(envs)}" for label, envs in where.items()) + f": {gap}."
        for gap, where in places.items()
    ]
    numbers = {gap: str(i) for i, gap in enumerate(places, 1)}
    lines = []
    for row in table.rows:
        triples = [(cell.mean, cell.stderr, numbers.get(cell.gap, "")) for cell in row.cells]
        triples.append((row.average, None, ""))
        columns = [
            (
                NOTHING if value is None else f"{value:.1f}",
                "" if error is None else f"± {error:.1f}",
                row.role == "student" and value is not None and value == top,
                number,
            )
            for (value, error, number), top in zip(triples, best, strict=True)
        ]
        lines.append(Line(row, columns))
    words = SELECTION_WORDS[table.selection]
    over = "the in-split of the held-out domain" if table.dataset != "Averages" else "held-out domains, averaged"
    spread = f"mean ± standard error, n = {table.n_trials} trials" if table.n_trials > 1 else "one trial"
    caption = f"Accuracy in percent on {over}, {spread}. Chosen: {words.rule}."
    return Layout(table, f"{table.dataset}: {words.name}", caption, lines, footnotes)


def say_not_asked(table: Table) -> str:
    """Say why a selection that the sweep never asked for has no table."""
    return (
        f"{table.dataset}: {SELECTION_WORDS[table.selection].name} needs runs with every pair of domains held out; "
        "this sweep holds out single domains only, so there is no such table."
    )


def _summarise_missing(results: Results) -> list[str]:
    plan = results.sweep.plan
    if not plan or not results.sweep.missing:
        return []
    return [f"Not done, so counted nowhere: {len(results.sweep.missing)} of {len(plan.jobs)} planned jobs."]


def format_text(results: Results) -> str:
    """Aligned columns for a terminal."""
    blocks, not_asked = [], []
    has_best = False
    printed: tuple[str, list[str]] | None = None
    for table in [*results.tables, *average_datasets(results)]:
        if not table.is_asked:
            not_asked.append(say_not_asked(table))
            continue
        layout = lay_out(table)
        has_best |= any(best for line in layout.lines for _, _, best, _ in line.columns)
        blocks.append("\n".join([layout.title, *textwrap.wrap(layout.caption, WIDTH), "", *_align(layout)]))
        if printed == (table.dataset, layout.footnotes):
            blocks.append("Footnotes as above.")
        elif layout.footnotes:
            numbered = [f"[{i}] {note}" for i, note in enumerate(layout.footnotes, 1)]
            blocks.append("\n".join(textwrap.fill(note, WIDTH, subsequent_indent="    ") for note in numbered))
            printed = (table.dataset, layout.footnotes)
    notes = ["* best student of its column"] if has_best else []
    notes += _summarise_missing(results) + not_asked
    blocks.append("\n".join(line for note in notes for line in textwrap.wrap(note, WIDTH, subsequent_indent="  ")))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _align(layout: Layout) -> list[str]:
    headers = [*layout.table.environments, "average"]
    columns = list(zip(*(line.columns for line in layout.lines), strict=True))
    texts: list[list[str]] = [[] for _ in layout.lines]
    widths = []
    for header, column in zip(headers, columns, strict=True):
        mean_width = max(len(value) for value, _, _, _ in column)
        for text, (value, error, best, number) in zip(texts, column, strict=True):
            body = f"{value:>{mean_width}} {error}".rstrip()
            text.append(body + ("*" if best else "") + (f" [{number}]" if number else ""))
        widths.append(max(len(header), *(len(text[-1]) for text in texts)))
    first = max(len(line.row.algorithm) for line in layout.lines)
    rows = [_join_columns("", first, headers, widths)]
    rule = "-" * (first + sum(widths) + 3 * len(widths))
    role = "student"
    for line, text in zip(layout.lines, texts, strict=True):
        if line.row.role != role:
            role = line.row.role
            rows += [rule, "teachers"]
        rows.append(_join_columns(line.row.algorithm, first, text, widths))
    return rows


def _join_columns(label: str, first: int, texts: list[str], widths: list[int]) -> str:
    padded = (f"{text:{width}}" for text, width in zip(texts, widths, strict=True))
    return "   ".join([f"{label:{first}}", *padded]).rstrip()


def format_markdown(results: Results) -> str:
    """Tables in Markdown, best student bold."""
    blocks, not_asked = [], []
    for table in [*results.tables, *average_datasets(results)]:
        if not table.is_asked:
            not_asked.append(_escape_markdown(say_not_asked(table)))
            continue
        layout = lay_out(table)
        headers = ["", *map(_escape_markdown, table.environments), "average"]
        rows = [headers, ["---"] + ["---:"] * (len(headers) - 1)]
        for line in layout.lines:
            cells = []
            for value, error, best, number in line.columns:
                text = f"{value} {error}".strip()
                cells.append((f"**{text}**" if best else text) + (f" <sup>{number}</sup>" if number else ""))
            rows.append([_escape_markdown(line.row.label), *cells])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        footnotes = [f"{i}. {_escape_markdown(note)}" for i, note in enumerate(layout.footnotes, 1)]
        title, caption = _escape_markdown(layout.title), _escape_markdown(layout.caption)
        blocks += [f"### {title}", caption, "\n".join(lines), "\n".join(footnotes)]
    return "\n\n".join(block for block in [*blocks, *_summarise_missing(results), *not_asked] if block) + "\n"


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", text)


def format_latex(results: Results) -> str:
    r"""LaTeX tables for \usepackage{booktabs}, best student bold."""
    blocks = [r"% Needs \usepackage{booktabs}."]
    not_asked = []
    for table in [*results.tables, *average_datasets(results)]:
        if not table.is_asked:
            not_asked.append("% " + say_not_asked(table))
            continue
        layout = lay_out(table)
        columns = "c" * (len(table.environments) + 1)
        headers = " & ".join(["Algorithm", *map(_escape_latex, table.environments), "Average"])
        rows = []
        for i, line in enumerate(layout.lines):
            if i and line.row.role != layout.lines[i - 1].row.role:
                rows.append(r"\midrule")
            cells = [_escape_latex(line.row.label)]
            for value, error, best, number in line.columns:
                text = _escape_latex(f"{value} {error}".strip())
                cells.append((rf"\textbf{{{text}}}" if best else text) + (rf"$^{{{number}}}$" if number else ""))
            rows.append(" & ".join(cells) + r" \\")
        caption = _escape_latex(f"{layout.title}. {layout.caption}")
        footnotes = [
            rf"\par\footnotesize $^{{{i}}}$ {_escape_latex(note)}" for i, note in enumerate(layout.footnotes, 1)
        ]
        top = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{l{columns}}}"]
        body = [r"\toprule", headers + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
        blocks.append("\n".join([*top, *body, *footnotes, r"\end{table}"]))
    return "\n\n".join([*blocks, *("% " + line for line in _summarise_missing(results)), *not_asked]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    NOTHING: "--",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)


def format_csv(results: Results) -> str:
    """One line a cell, the average of a row as environment "average"; `missing` says what a cell lacks."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["dataset", "selection", "role", "algorithm", "env", "mean", "stderr", "n", "missing"])
    for table in results.tables:
        for row in table.rows if table.is_asked else ():
            start = [table.dataset, table.selection, row.role, row.algorithm]
            for cell in row.cells:
                writer.writerow([*start, cell.env, cell.mean, cell.stderr, len(cell.values), cell.gap])
            writer.writerow([*start, "average", row.average, None, None, None])
    return out.getvalue()


def format_json(results: Results) -> str:
    """Schema 1 as indented JSON."""
    return json.dumps(to_json(results), indent=2) + "\n"


FORMATS: dict[str, Callable[[Results], str]] = {
    "text": format_text,
    "markdown": format_markdown,
    "latex": format_latex,
    "csv": format_csv,
    "json": format_json,
}
