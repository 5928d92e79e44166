"""Tables of a sweep: one for each data set and selection, students first, then the teachers behind them.

A student's number is the chosen checkpoint's accuracy on the in-split of the held-out domain. A teacher's is its own,
at its last record: its row shows the teacher behind the chosen student, of several such students the nearest one (see
`lineage.rank_student`). So the teachers' rows follow the selection, and `hparams_seed` of a teacher's number is that of
the student it stands behind.

Nothing here depends on when or where the sweep ran.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.results.lineage import TracedTeacher, rank_student, trace_teachers
from daft_domainbed.results.missing import Missing, cut_sweep_path
from daft_domainbed.results.plans import order_algorithms
from daft_domainbed.results.records import Run
from daft_domainbed.results.selection import SELECTIONS, Choice, choose, group_runs
from daft_domainbed.results.statistics import mean, standard_error
from daft_domainbed.results.sweeps import Sweep
from daft_domainbed.results.values import as_list


class Number(NamedTuple):
    """One trial's accuracy (percent) in a cell: the chosen student and, in a teacher's row, the teacher behind it."""

    accuracy: float
    choice: Choice
    teacher: TracedTeacher | None


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
        """Name of the row where students and teachers stand in one table."""
        return self.algorithm if self.role == "student" else f"{self.algorithm} teacher"

    @property
    def average(self) -> float | None:
        """Mean over the held-out domains; None unless each has a value."""
        means = [cell.mean for cell in self.cells]
        return mean([m for m in means if m is not None]) if None not in means else None

    def list_trials(self) -> dict[int, list[float]]:
        """Return the accuracies, in percent, of each trial that has one for every held-out domain."""
        cells = [{number.choice.run.key.trial_seed: number.accuracy for number in cell.numbers} for cell in self.cells]
        trials = sorted(set.intersection(*map(set, cells))) if cells else []
        return {trial: [cell[trial] for cell in cells] for trial in trials}

    @property
    def average_stderr(self) -> float | None:
        """Standard error of the average: over trials, of the mean over held-out domains; None for fewer than two."""
        return standard_error([sum(accs) / len(accs) for accs in self.list_trials().values()])


@dataclass(frozen=True)
class Table:
    """One data set under one selection.

    Attributes:
        dataset: Its name; "Averages" over data sets.
        selection: The rule that chose the checkpoints.
        environments: Names of its domains.
        rows: Students, then teachers.
        is_asked: False where the sweep has no runs for this selection at all.
        label: What the data set is called in print, where it is not its name.
        caption: What stands in the place of the caption, where anything was given.
    """

    dataset: str
    selection: str
    environments: list[str]
    rows: list[Row]
    is_asked: bool
    label: str = ""
    caption: str = ""

    @property
    def name(self) -> str:
        """What the data set is called in print."""
        return self.label or self.dataset

    @property
    def n_trials(self) -> int:
        """Largest number of trials behind any cell."""
        return max((len(cell.values) for row in self.rows for cell in row.cells), default=0)

    def find_best(self) -> list[float | None]:
        """Return the best student's mean of each column, the average last; None where none is better than another."""
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
    """Tabulate what each selection chooses; data sets are in the order the sweep was asked for, else by alphabet."""
    asked = as_list(sweep.plan.args.get("datasets")) if sweep.plan else []
    planned = {run.key.dataset for run in sweep.plan.runs.values()} if sweep.plan else set()
    datasets = planned or {run.key.dataset for run in sweep.runs}
    ordered = sorted(datasets, key=lambda name: (asked.index(name) if name in asked else len(asked), name))
    return Results(sweep, [table for name in ordered for table in _DatasetTables(sweep, name).build()])


Choices = Mapping[tuple[str, int, int], Choice]  # by algorithm, held-out domain and trial
# Chosen students with each teacher behind them, by held-out domain and trial, in the order of the students' rows.
Behind = dict[tuple[int, int], list[tuple[Choice, TracedTeacher]]]


class _DatasetTables:
    """Builds the tables of one data set."""

    def __init__(self, sweep: Sweep, dataset: str) -> None:
        self.sweep = sweep
        self.dataset = dataset
        self.names = sweep.environments[dataset]
        planned = [run for run in sweep.plan.runs.values() if run.key.dataset == dataset] if sweep.plan else []
        runs = [run for run in sweep.runs if run.key.dataset == dataset]
        keys = [run.key for run in planned if not run.is_teacher] or [run.key for run in runs]
        self.algorithms = order_algorithms(sweep.plan, (key.algorithm for key in keys))
        self.planned_teachers = {run.key.algorithm for run in planned if run.is_teacher}
        self.trials = sorted({key.trial_seed for key in keys})
        self.has_pairs = any(len(key.test_envs) == 2 for key in keys)
        self.missing = [missing for missing in sweep.missing if missing.planned.key.dataset == dataset]
        self.groups = group_runs(runs)

    def build(self) -> Iterator[Table]:
        for selection in SELECTIONS:
            choices = {
                (group.algorithm, group.test_env, group.trial_seed): choice
                for group, runs in self.groups.items()
                if group.trial_seed in self.trials and (choice := choose(selection, runs, group.test_env))
            }
            students = [self._build_student(selection, name, choices) for name in self.algorithms]
            is_asked = self.has_pairs or selection != "leave-one-domain-out"
            yield Table(self.dataset, selection, self.names, students + self._build_teachers(choices), is_asked)

    def _build_student(self, selection: str, algorithm: str, choices: Choices) -> Row:
        cells = []
        for env, name in enumerate(self.names):
            found = [choices[key] for trial in self.trials if (key := (algorithm, env, trial)) in choices]
            numbers = [Number(100 * choice.test_acc, choice, None) for choice in found]
            wanted = 2 if selection == "leave-one-domain-out" else 1
            missing = [
                m
                for m in self.missing
                if (m.planned.is_teacher, m.planned.key.algorithm) == (False, algorithm)
                and env in m.planned.key.test_envs
                and len(m.planned.key.test_envs) <= wanted
            ]
            why = "no run" if wanted == 1 else "no step that a run and all its pairs of held-out domains share"
            cells.append(self._make_cell(env, name, numbers, missing, why))
        return Row(algorithm, "student", cells)

    def _build_teachers(self, choices: Choices) -> list[Row]:
        """Build the rows of all teachers that are planned, or stand behind a chosen student."""
        behind: Behind = {}
        for algorithm, env, trial in itertools.product(self.algorithms, range(len(self.names)), self.trials):
            if choice := choices.get((algorithm, env, trial)):
                teachers = trace_teachers(self.sweep, choice.run)
                behind.setdefault((env, trial), []).extend((choice, teacher) for teacher in teachers)
        found = {teacher.algorithm for pairs in behind.values() for _, teacher in pairs}
        return [self._build_teacher(name, behind) for name in order_algorithms(None, self.planned_teachers | found)]

    def _build_teacher(self, algorithm: str, behind: Behind) -> Row:
        cells = []
        for env, name in enumerate(self.names):
            found = (_find_teacher(algorithm, env, behind.get((env, trial), [])) for trial in self.trials)
            missing = [
                m
                for m in self.missing
                if (m.planned.is_teacher, m.planned.key.algorithm, m.planned.key.test_envs) == (True, algorithm, (env,))
            ]
            cells.append(self._make_cell(env, name, [n for n in found if n], missing, "no student of it is done"))
        return Row(algorithm, "teacher", cells)

    def _make_cell(self, env: int, name: str, numbers: list[Number], missing: list[Missing], why: str) -> Cell:
        by_reason: dict[str, list[str]] = {}
        for planned, reason in missing:
            pair = [self.names[e] for e in planned.key.test_envs if e != env and e < len(self.names)]
            where = f"trial {planned.key.trial_seed}, hparams_seed {planned.key.hparams_seed}"
            by_reason.setdefault(reason, []).append(where + "".join(f", with {other} held out too" for other in pair))
        explained = {m.planned.key.trial_seed for m in missing} | {n.choice.run.key.trial_seed for n in numbers}
        for trial in self.trials:
            if trial not in explained:
                by_reason.setdefault(why, []).append(f"trial {trial}")
        gap = "; ".join(f"{reason} ({_shorten(places)})" for reason, places in by_reason.items())
        return Cell(name, [number.accuracy for number in numbers], numbers, gap)


def _find_teacher(algorithm: str, env: int, behind: Sequence[tuple[Choice, TracedTeacher]]) -> Number | None:
    """Find the teacher of an algorithm that its row shows, among those behind chosen students."""
    found = [
        (rank_student(choice.run, teacher), Number(100 * acc, choice, teacher))
        for choice, teacher in behind
        if teacher.algorithm == algorithm and (acc := teacher.read_acc(env)) is not None
    ]
    return min(found, key=lambda entry: entry[0])[1] if found else None


def _shorten(places: list[str], most: int = 3) -> str:
    rest = [f"and {len(places) - most} more"] if len(places) > most else []
    return "; ".join(places[:most] + rest)


def read_hparams(sweep: Sweep, run: Run) -> dict[str, Any]:
    """Return a run's hyperparameters by name; a path into the sweep is relative to it."""
    return {
        name: cut_sweep_path(value, sweep.root, run) if isinstance(value, str) else value
        for name, value in sorted(run.hparams.items())
    }


def present(
    results: Results, *, selection: str | None = None, names: Mapping[str, str] | None = None, caption: str = ""
) -> Results:
    """Return results as a paper shows them.

    Args:
        results: All tables.
        selection: The only one whose tables stay; all stay without it.
        names: What data sets are called in print, by their names.
        caption: What stands in the place of the captions.

    Raises:
        UsageError: There is no such data set, or a caption for several tables.
    """
    known = list(dict.fromkeys(table.dataset for table in results.tables))
    for name in names or {}:
        if name not in known:
            raise UsageError(f"--dataset_name {name}=...: no such data set.{suggest(name, known)} There are {known}")
    tables = [
        replace(table, label=(names or {}).get(table.dataset, ""), caption=caption)
        for table in results.tables
        if selection in (None, table.selection)
    ]
    if caption and (asked := sum(table.is_asked for table in tables)) > 1:
        raise UsageError(f"--caption would stand over {asked} tables: choose one with --selection")
    return replace(results, tables=tables)


def average_datasets(results: Results) -> list[Table]:
    """Average over held-out domains, then tabulate data sets, for each selection that every data set was asked for.

    A data set's number is the mean over trials of the trial's average; a trial counts when it has every domain.
    """
    datasets = list(dict.fromkeys(table.dataset for table in results.tables))
    tables = []
    for selection in SELECTIONS if len(datasets) > 1 else ():
        parts = [table for table in results.tables if table.selection == selection]
        if not parts or not all(table.is_asked for table in parts):
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
        tables.append(Table("Averages", selection, [table.name for table in parts], rows, is_asked=True))
    return tables


def _average_row(table: Table, algorithm: str, role: str) -> Cell:
    row = next((row for row in table.rows if (row.algorithm, row.role) == (algorithm, role)), None)
    if row is None:
        return Cell(table.dataset, [], [], "not in this data set's sweep")
    complete = [sum(accs) / len(accs) for accs in row.list_trials().values()]
    gap = "some held-out domains are missing, see its table" if any(cell.gap for cell in row.cells) else ""
    return Cell(table.dataset, complete, [], gap)
