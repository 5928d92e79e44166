"""What a table is made of: numbers, cells, rows, and what can be said of all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from daft_domainbed.results.asked import LEAVE_OUT
from daft_domainbed.results.lineage import TracedTeacher
from daft_domainbed.results.records import Run
from daft_domainbed.results.selection import Choice
from daft_domainbed.results.settings import name_row
from daft_domainbed.results.statistics import mean, standard_error


class Number(NamedTuple):
    """One trial's accuracy (percent) in a cell: the chosen student and, in a teacher's row, the teacher behind it."""

    accuracy: float
    choice: Choice
    teacher: TracedTeacher | None


@dataclass(frozen=True)
class Cell:
    """A cell: `values` in percent, one a trial; `gap` says what is missing from it and why.

    Attributes:
        with_others: Domains that are held out beside this one, in words; empty where there are none.
        is_asked: Whether the sweep asked for it; other cells are empty.
    """

    env: str
    values: list[float]
    numbers: list[Number]
    gap: str
    with_others: str = ""
    is_asked: bool = True

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
    """The cells of one algorithm as "student" or "teacher".

    Attributes:
        setting: In what its runs differ from the algorithm's other rows, in words; None where it has one row.
        source: The only domain that its runs train on; None but of single sources.
        commits: At which its runs were begun, as far as they say so.
        origins: What their networks, and those of their teachers, start from, where that is not nothing.
    """

    algorithm: str
    role: str
    cells: list[Cell]
    setting: str | None = None
    source: str | None = None
    commits: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The algorithm, with what tells its rows apart."""
        return name_row(self.algorithm, self.setting)

    @property
    def label(self) -> str:
        """Name of the row where students and teachers stand in one table."""
        return (self.name if self.role == "student" else f"{self.name} teacher") + self.origin

    @property
    def origin(self) -> str:
        """The source in words."""
        return f" from {self.source}" if self.source is not None else ""

    def describe(self) -> dict[str, Any]:
        """Return what it is, as the json of a table says it."""
        return {
            "algorithm": self.algorithm,
            "role": self.role,
            **({"setting": self.setting} if self.setting else {}),
            **({"source": self.source} if self.source is not None else {}),
            **({"origins": list(self.origins)} if self.origins else {}),
        }

    def is_of(self, algorithm: str, role: str, setting: str | None) -> bool:
        """Return whether it is one of an algorithm's rows, from whatever source."""
        return (self.algorithm, self.role, self.setting) == (algorithm, role, setting)

    @property
    def asked(self) -> list[Cell]:
        """The cells that the sweep asked for, over which averages are taken."""
        return [cell for cell in self.cells if cell.is_asked]

    @property
    def average(self) -> float | None:
        """Mean over the held-out domains that were asked for; None unless each has a value."""
        means = [cell.mean for cell in self.asked]
        return mean([m for m in means if m is not None]) if None not in means else None

    def list_trials(self) -> dict[int, list[float]]:
        """Return the accuracies, in percent, of each trial that has one for every held-out domain."""
        cells = [{number.choice.run.key.trial_seed: number.accuracy for number in cell.numbers} for cell in self.asked]
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
        is_asked: False where the sweep has no runs for this selection at all.
        kind: "leave-out" or "single-source".
        held_out: Names of the domains that averages are means over.
        label: What the data set is called in print, where it is not its name.
        caption: What stands in the place of the caption, where anything was given.
    """

    dataset: str
    selection: str
    environments: list[str]
    rows: list[Row]
    is_asked: bool
    kind: str = LEAVE_OUT
    held_out: tuple[str, ...] = ()
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

    def find_best(self, source: str | None = None) -> list[float | None]:
        """Return the best student's mean of each column, the average last; None where none is better than another.

        Args:
            source: Among the rows of one source alone.
        """
        students = [row for row in self.rows if (row.role, row.source) == ("student", source)]
        columns = [[row.cells[i].mean for row in students] for i in range(len(self.environments))]
        columns.append([row.average for row in students])
        values = [[value for value in column if value is not None] for column in columns]
        return [max(column) if len({*column}) > 1 else None for column in values]

    def average_sources(self) -> list[Row]:
        """Return, of single sources, a row an algorithm with the mean over all sources but the target itself."""
        rows = {(row.algorithm, row.role, row.setting): None for row in self.rows if row.source is not None}
        return [
            make_mean(
                [_average_cells([row.cells[i] for row in own]) for i in range(len(self.environments))],
                own,
            )
            for key in rows
            for own in [[row for row in self.rows if row.is_of(*key)]]
        ]


def make_mean(cells: list[Cell], rows: Sequence[Row]) -> Row:
    """Return a row of means over rows of one algorithm and setting, with what is to be said of any of them."""
    commits = tuple(sorted({commit for row in rows for commit in row.commits}))
    origins = tuple(sorted({origin for row in rows for origin in row.origins}))
    return Row(rows[0].algorithm, rows[0].role, cells, rows[0].setting, None, commits, origins)


def _average_cells(cells: Sequence[Cell]) -> Cell:
    """Average over sources, trial by trial as far as every source has a number."""
    asked = [cell for cell in cells if cell.is_asked]
    by_trial: dict[int, list[float]] = {}
    for cell in asked:
        for number in cell.numbers:
            by_trial.setdefault(number.choice.run.key.trial_seed, []).append(number.accuracy)
    values = [sum(accs) / len(accs) for _, accs in sorted(by_trial.items()) if len(accs) == len(asked)]
    return Cell(cells[0].env, values, [], "", is_asked=bool(asked))


def get_run(number: Number) -> Run | None:
    """Return the run that a number is of: the chosen student, or the teacher behind it where its run is known."""
    return number.teacher.run if number.teacher else number.choice.run
