"""The table of a sweep's evaluations: a row a method, a column a question, means over trials."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daft_domainbed.results.lineage import rank_student, trace_teachers
from daft_domainbed.results.plans import order_algorithms
from daft_domainbed.results.records import Note, Run
from daft_domainbed.results.selection import Choice, choose, group_runs
from daft_domainbed.results.statistics import mean, standard_error
from daft_domainbed.results.sweeps import Sweep
from daft_domainbed.results.values import as_dict, as_list, is_number
from daft_domainbed.runtime.layout import EVALUATION_FILE, EVALUATION_FOLDER

SELECTION = "training-domain"
CLEAN, WORST, CORRUPTIONS, ECE, AUROC = "clean held-out", "worst class", "corruption mean", "ECE", "AUROC"


@dataclass(frozen=True)
class Value:
    """A cell: one number a trial, each the mean over the held-out domains."""

    numbers: Sequence[float]

    @property
    def mean(self) -> float | None:
        """Mean over trials."""
        return mean(self.numbers)

    @property
    def stderr(self) -> float | None:
        """Standard error over trials; None for fewer than two."""
        return standard_error(self.numbers)

    def describe(self) -> dict[str, float | None]:
        """Return what the json of a table has of it."""
        return {"mean": self.mean, "stderr": self.stderr, "n": len(self.numbers)}

    def format(self, digits: int = 1) -> str:
        """Return mean, standard error and, in brackets, the number of trials."""
        error = "" if self.stderr is None else f" ± {self.stderr:.{digits}f}"
        return f"{self.mean:.{digits}f}{error} ({len(self.numbers)})"


@dataclass(frozen=True)
class Row:
    """What was measured of a method, as "student" or "teacher"; by column."""

    algorithm: str
    role: str
    values: dict[str, Value]

    @property
    def label(self) -> str:
        """What a reader calls it."""
        return self.algorithm if self.role == "student" else f"{self.algorithm} {self.role}"

    def format(self, column: str) -> str:
        """Return the text of a cell."""
        value = self.values.get(column)
        return "-" if value is None else value.format(3 if column in (ECE, AUROC) else 1)


@dataclass(frozen=True)
class RobustnessTable:
    """The rows of one data set."""

    dataset: str
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """Columns that any row has, in the order of the questions."""
        found = dict.fromkeys(name for row in self.rows for name in row.values)
        robust = [name for name in found if name.startswith("robust")]
        return [name for name in (CLEAN, WORST, *robust, CORRUPTIONS, ECE, AUROC) if name in found]


# Runs by algorithm and role, then by held-out domain and trial.
Models = dict[tuple[str, str], dict[tuple[int, int], Run]]


def build_robustness(sweep: Sweep) -> tuple[list[RobustnessTable], list[Note]]:
    """Tabulate the evaluations of the checkpoints that training-domain validation chose, and of their teachers.

    Returns:
        A table for each data set, and a note for each chosen checkpoint that was not evaluated.
    """
    notes: list[Note] = []
    tables = []
    for dataset, models in gather_models(sweep).items():
        rows = [_build_row(sweep, *name, runs, notes) for name, runs in models.items()]
        tables.append(RobustnessTable(dataset, [row for row in rows if row.values]))
    return tables, notes


def gather_models(sweep: Sweep) -> dict[str, Models]:
    """Return, by data set, the runs that training-domain validation chose, then the teachers that stand behind them."""
    choices: dict[str, list[Choice]] = defaultdict(list)
    for group, runs in group_runs(sweep.runs).items():
        if choice := choose(SELECTION, runs, group.test_env):
            choices[group.dataset].append(choice)
    return {dataset: _gather(sweep, choices[dataset]) for dataset in sorted(choices)}


def _gather(sweep: Sweep, choices: Sequence[Choice]) -> Models:
    students: dict[str, dict[tuple[int, int], Run]] = defaultdict(dict)
    teachers: dict[str, dict[tuple[int, int], tuple[Any, Run]]] = defaultdict(dict)
    for choice in choices:
        place = (choice.run.key.test_envs[0], choice.run.key.trial_seed)
        students[choice.run.key.algorithm][place] = choice.run
        for teacher in trace_teachers(sweep, choice.run):
            rank = rank_student(choice.run, teacher)
            known = teachers[teacher.algorithm].get(place)
            if teacher.run is not None and (known is None or rank < known[0]):
                teachers[teacher.algorithm][place] = (rank, teacher.run)
    found = {name: {place: run for place, (_, run) in runs.items()} for name, runs in teachers.items() if runs}
    return {
        **{(name, "student"): students[name] for name in order_algorithms(sweep.plan, students)},
        **{(name, "teacher"): found[name] for name in order_algorithms(None, found)},
    }


def _build_row(sweep: Sweep, algorithm: str, role: str, runs: dict[tuple[int, int], Run], notes: list[Note]) -> Row:
    found: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for (env, trial), run in sorted(runs.items()):
        for column, number in _read_evaluation(sweep.root, run, notes).items():
            found[column][trial][env] = number
    return Row(algorithm, role, average_domains(found, len({env for env, _ in runs})))


def average_domains(found: Mapping[str, Mapping[int, Mapping[int, float]]], n_envs: int) -> dict[str, Value]:
    """Return means over held-out domains by column, of numbers by column, trial and domain.

    A trial counts where it has every domain: domains differ more than trials do.
    """
    values = {
        column: Value([sum(envs.values()) / n_envs for _, envs in sorted(trials.items()) if len(envs) == n_envs])
        for column, trials in found.items()
    }
    return {column: value for column, value in values.items() if value.numbers}


def read_evaluation(root: Path, run: Run) -> dict[str, Any]:
    """Return the json of a run's evaluation; an empty one where there is none that can be read."""
    try:
        return as_dict(json.loads((root / run.folder / EVALUATION_FOLDER / EVALUATION_FILE).read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}


def _read_evaluation(root: Path, run: Run, notes: list[Note]) -> dict[str, float]:
    """Return the numbers of a run's evaluation by column."""
    model = read_evaluation(root, run)
    if not model:
        notes.append(Note(run.folder, "was chosen and is not evaluated: 'daft-domainbed sweep evaluate' does that"))
    names = as_list(model.get("environments"))
    held_out = {names[env] for env in run.key.test_envs if env < len(names)}
    return {column: number for column, number in list_numbers(model, held_out) if is_number(number)}


def list_numbers(model: dict[str, Any], held_out: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield columns and numbers of a model's json, None where it has none.

    Args:
        model: What `evaluate` wrote.
        held_out: Names of the domains that it is judged by.
    """
    for column, key in ((CLEAN, "clean"), (WORST, "worst_class")):
        yield column, mean([n for env, n in as_dict(model.get(key)).items() if env in held_out and is_number(n)])
    lowest: dict[str, dict[str, float]] = {}
    for row in map(as_dict, as_list(model.get("attacks"))):
        if row.get("env") in held_out and is_number(row.get("accuracy")) and is_number(row.get("eps")):
            by_env = lowest.setdefault(f"robust at {row.get('norm')} {format_radius(row['eps'])}", {})
            by_env[row["env"]] = min(row["accuracy"], by_env.get(row["env"], 100.0))
    yield from ((column, mean([*by_env.values()])) for column, by_env in lowest.items())
    yield CORRUPTIONS, as_dict(model.get("corruptions")).get("mean")
    yield ECE, as_dict(model.get("calibration")).get("ece")
    rows = [row for row in map(as_dict, as_list(model.get("ood"))) if row.get("score") == "msp"]
    yield AUROC, mean([row["auroc"] for row in rows if is_number(row.get("auroc"))])


def format_radius(eps: float) -> str:
    """Return a radius as people write it: in 255ths where it is a whole number or quarter of these.

    Example:
        >>> format_radius(4 / 255), format_radius(0.25 / 255), format_radius(0.5), format_radius(0)
        ('4/255', '0.25/255', '0.5', '0')
    """
    levels = round(eps * 255, 6)
    is_round = f"{eps:g}" == f"{eps:.2g}"  # a radius that was given in units, such as 0.5
    return f"{eps:g}" if is_round or levels * 4 % 1 else f"{levels:g}/255"


# --- formats -----------------------------------------------------------------------------------------------------


def _to_json(tables: Sequence[RobustnessTable]) -> str:
    """Return the tables as JSON (schema 1)."""
    content = [
        {
            "dataset": table.dataset,
            "rows": [
                {
                    "algorithm": row.algorithm,
                    "role": row.role,
                    "values": {name: value.describe() for name, value in row.values.items()},
                }
                for row in table.rows
            ],
        }
        for table in tables
    ]
    return json.dumps({"schema": 1, "robustness": content}, indent=1) + "\n"


def _list_cells(table: RobustnessTable) -> Iterator[list[str]]:
    yield ["", *table.columns]
    for row in table.rows:
        yield [row.label, *map(row.format, table.columns)]


_FOOT = (
    "Checkpoints chosen by training-domain validation. Mean over trials, of means over held-out domains, with the "
    "standard error and, in brackets, the number of trials. Robust: under the strongest attack that was asked."
)


def _to_text(tables: Sequence[RobustnessTable]) -> str:
    blocks = []
    for table in tables:
        cells = list(_list_cells(table))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (" ".join(f"{text:<{width + 1}}" for text, width in zip(row, widths, strict=True)) for row in cells)
        blocks.append("\n".join([table.dataset, "", *map(str.rstrip, lines), ""]))
    return "\n".join([*blocks, _FOOT, ""])


def _to_markdown(tables: Sequence[RobustnessTable]) -> str:
    blocks = []
    for table in tables:
        head, *rows = _list_cells(table)
        lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
        blocks.append("\n".join([f"## {table.dataset}", "", *lines, ""]))
    return "\n".join([*blocks, _FOOT, ""])


def _to_csv(tables: Sequence[RobustnessTable]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["dataset", "algorithm", "role", "column", "mean", "stderr", "n"])
    for table in tables:
        for row in table.rows:
            for name, value in row.values.items():
                error = "" if value.stderr is None else value.stderr
                writer.writerow([table.dataset, row.algorithm, row.role, name, value.mean, error, len(value.numbers)])
    return file.getvalue()


FORMATS: dict[str, Callable[[Sequence[RobustnessTable]], str]] = {
    "text": _to_text,
    "markdown": _to_markdown,
    "csv": _to_csv,
    "json": _to_json,
}
