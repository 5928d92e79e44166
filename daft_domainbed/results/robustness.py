"""The table of a sweep's evaluations: a row a method, a column a question, means over trials."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from daft_domainbed.results.asked import LEAVE_OUT, Held
from daft_domainbed.results.grids import to_csv
from daft_domainbed.results.lineage import rank_student, trace_teachers
from daft_domainbed.results.plans import order_algorithms
from daft_domainbed.results.records import Note, Run
from daft_domainbed.results.selection import Choice, choose, group_runs
from daft_domainbed.results.settings import Setting, describe_settings, name_row
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
    setting: str | None
    values: dict[str, Value]
    origins: tuple[str, ...]

    @property
    def label(self) -> str:
        """What a reader calls it: its name, with what tells it from other rows of the algorithm."""
        name = name_row(self.algorithm, self.setting)
        return name if self.role == "student" else f"{name} {self.role}"

    def describe(self) -> dict[str, Any]:
        """Return what the json of a table has of it beside its values."""
        return {
            "algorithm": self.algorithm,
            "role": self.role,
            **({"setting": self.setting} if self.setting else {}),
            **({"origins": list(self.origins)} if self.origins else {}),
        }

    def format(self, column: str) -> str:
        """Return the text of a cell."""
        value = self.values.get(column)
        return "-" if value is None else value.format(3 if column in (ECE, AUROC) else 1)


@dataclass(frozen=True)
class RobustnessTable:
    """The rows of one data set and kind, as tables of accuracies are."""

    dataset: str
    kind: str
    rows: list[Row]

    @property
    def title(self) -> str:
        """What stands above it."""
        return name_kind(self.dataset, self.kind)

    @property
    def columns(self) -> list[str]:
        """Columns that any row has, in the order of the questions."""
        found = dict.fromkeys(name for row in self.rows for name in row.values)
        robust = [name for name in found if name.startswith("robust")]
        return [name for name in (CLEAN, WORST, *robust, CORRUPTIONS, ECE, AUROC) if name in found]


class Lot(NamedTuple):
    """Which models a row is of."""

    algorithm: str
    role: str
    setting: str | None


Place = tuple[Held, int]  # held-out domains and trial
Models = dict[Lot, dict[Place, Run]]


def build_robustness(sweep: Sweep) -> tuple[list[RobustnessTable], list[Note]]:
    """Tabulate the evaluations of the checkpoints that training-domain validation chose, and of their teachers.

    Returns:
        A table for each data set, and a note for each chosen checkpoint that was not evaluated.
    """
    notes: list[Note] = []
    tables = []
    for (dataset, kind), models in gather_models(sweep).items():
        rows = [_build_row(lot, runs, notes) for lot, runs in models.items()]
        tables.append(RobustnessTable(dataset, kind, [row for row in rows if row.values]))
    return tables, notes


def name_kind(dataset: str, kind: str) -> str:
    """Return what a data set is called where it was not asked of it what usually is."""
    return dataset if kind == LEAVE_OUT else f"{dataset}, trained on one domain alone"


def gather_models(sweep: Sweep) -> dict[tuple[str, str], Models]:
    """Return, by data set and kind, what training-domain validation chose, then the teachers that stand behind it."""
    choices: dict[tuple[str, str], list[Choice]] = defaultdict(list)
    for group, runs in group_runs(sweep).items():
        if choice := choose(SELECTION, runs, group.test_env, group.held_out):
            choices[group.dataset, group.kind].append(choice)
    return {key: _gather(sweep, choices[key]) for key in sorted(choices)}


def _gather(sweep: Sweep, choices: Sequence[Choice]) -> Models:
    students: dict[str, dict[Setting, dict[Place, Run]]] = defaultdict(lambda: defaultdict(dict))
    teachers: dict[str, dict[Place, tuple[Any, Run]]] = defaultdict(dict)
    for choice in choices:
        place = (choice.run.key.test_envs, choice.run.key.trial_seed)
        students[choice.run.key.algorithm][choice.run.setting][place] = choice.run
        for teacher in trace_teachers(sweep, choice.run):
            rank = rank_student(choice.run, teacher)
            known = teachers[teacher.algorithm].get(place)
            if teacher.run is not None and (known is None or rank < known[0]):
                teachers[teacher.algorithm][place] = (rank, teacher.run)
    found = {name: {place: run for place, (_, run) in runs.items()} for name, runs in teachers.items() if runs}
    return {
        **{
            Lot(name, "student", text): students[name][setting]
            for name in order_algorithms(sweep.plan, students)
            for setting, text in describe_settings(students[name]).items()
        },
        **{Lot(name, "teacher", None): found[name] for name in order_algorithms(None, found)},
    }


def _build_row(lot: Lot, runs: Mapping[Place, Run], notes: list[Note]) -> Row:
    found: dict[str, dict[int, dict[Held, float]]] = defaultdict(lambda: defaultdict(dict))
    for (held_out, trial), run in sorted(runs.items(), key=lambda item: item[0]):
        for column, number in _read_evaluation(run, notes).items():
            found[column][trial][held_out] = number
    return Row(*lot, average_domains(found, len({held_out for held_out, _ in runs})), list_origins(runs.values()))


def list_origins(runs: Iterable[Run]) -> tuple[str, ...]:
    """Return what the networks of runs start from, each once."""
    return tuple(dict.fromkeys(origin for run in runs for origin in run.origins))


def list_marks(rows: Iterable[Row]) -> list[str]:
    """Return a sentence for each row whose networks do not start from nothing."""
    return list(dict.fromkeys(f"{row.label}: rests on {origin}." for row in rows for origin in row.origins))


def average_domains(found: Mapping[str, Mapping[int, Mapping[Held, float]]], n_envs: int) -> dict[str, Value]:
    """Return means over held-out domains by column, of numbers by column, trial and domains held out together.

    A trial counts where it has every domain: domains differ more than trials do.
    """
    values = {
        column: Value([sum(envs.values()) / n_envs for _, envs in sorted(trials.items()) if len(envs) == n_envs])
        for column, trials in found.items()
    }
    return {column: value for column, value in values.items() if value.numbers}


def read_evaluation(run: Run) -> dict[str, Any]:
    """Return the json of a run's evaluation; an empty one where there is none that can be read."""
    try:
        return as_dict(json.loads((run.path / EVALUATION_FOLDER / EVALUATION_FILE).read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}


def _read_evaluation(run: Run, notes: list[Note]) -> dict[str, float]:
    """Return the numbers of a run's evaluation by column."""
    model = read_evaluation(run)
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
            "kind": table.kind,
            "rows": [
                row.describe() | {"values": {name: value.describe() for name, value in row.values.items()}}
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
        blocks.append("\n".join([table.title, "", *map(str.rstrip, lines), *list_marks(table.rows), ""]))
    return "\n".join([*blocks, _FOOT, ""])


def _to_markdown(tables: Sequence[RobustnessTable]) -> str:
    blocks = []
    for table in tables:
        head, *rows = _list_cells(table)
        lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
        marks = [f"\n{mark}" for mark in list_marks(table.rows)]
        blocks.append("\n".join([f"## {table.title}", "", *lines, *marks, ""]))
    return "\n".join([*blocks, _FOOT, ""])


def _to_csv(tables: Sequence[RobustnessTable]) -> str:
    head = ["dataset", "algorithm", "role", "column", "mean", "stderr", "n", "setting", "kind", "origins"]
    rows = []
    for table in tables:
        for row in table.rows:
            start, end = [table.dataset, row.algorithm, row.role], [row.setting, table.kind, "; ".join(row.origins)]
            for name, value in row.values.items():
                rows.append([*start, name, value.mean, value.stderr, len(value.numbers), *end])
    return to_csv(head, rows)


FORMATS: dict[str, Callable[[Sequence[RobustnessTable]], str]] = {
    "text": _to_text,
    "markdown": _to_markdown,
    "csv": _to_csv,
    "json": _to_json,
}
