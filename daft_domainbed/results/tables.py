"""Tables of a sweep: one for each data set and selection, students first, then the teachers behind them.

A student's number is the chosen checkpoint's accuracy on the in-split of the held-out domain. A teacher's is its own,
at its last record: its row shows the teacher behind the chosen student, of several such students the nearest one (see
`lineage.rank_student`). So the teachers' rows follow the selection, and `hparams_seed` of a teacher's number is that of
the student it stands behind.

Nothing here depends on when or where the sweep ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.results.asked import LEAVE_OUT, Held
from daft_domainbed.results.cells import Cell, Number, Row, Table, get_run, make_mean
from daft_domainbed.results.lineage import TracedTeacher, rank_student, trace_teachers
from daft_domainbed.results.missing import Missing, cut_sweep_path
from daft_domainbed.results.plans import order_algorithms
from daft_domainbed.results.records import Run, read_origins
from daft_domainbed.results.selection import SELECTIONS, Choice, Group, choose, group_runs
from daft_domainbed.results.settings import Setting, describe_settings, is_given, read_networks
from daft_domainbed.results.sweeps import Sweep
from daft_domainbed.results.values import as_list


@dataclass(frozen=True)
class Results:
    """All tables of a sweep and the sweep itself."""

    sweep: Sweep
    tables: list[Table]


def build_results(sweep: Sweep) -> Results:
    """Tabulate what each selection chooses; data sets are in the order the sweep was asked for, else by alphabet."""
    asked = as_list(sweep.plan.args.get("datasets")) if sweep.plan else []
    ordered = sorted(sweep.asked, key=lambda key: (asked.index(key[0]) if key[0] in asked else len(asked), *key))
    groups: dict[tuple[str, str], Groups] = {key: {} for key in ordered}
    for group, runs in group_runs(sweep).items():
        groups[group.dataset, group.kind][group] = runs
    return Results(sweep, [table for key in ordered for table in _DatasetTables(sweep, *key, groups[key]).build()])


Groups = dict[Group, list[Run]]
_ALONE: dict[Setting, str | None] = {(): None}
Place = tuple[int | None, int]  # source and held-out domain
Choices = Mapping[tuple[str, Setting, Place, int], Choice]  # by algorithm, setting, place and trial
# Chosen students with each teacher behind them and its network, by place and trial, in the order of the students' rows.
Behind = dict[tuple[Place, int], list[tuple[Choice, TracedTeacher, Setting]]]


class _DatasetTables:
    """Builds the tables of one data set and kind."""

    def __init__(self, sweep: Sweep, dataset: str, kind: str, groups: Groups) -> None:
        self.sweep, self.dataset, self.kind, self.groups = sweep, dataset, kind, groups
        self.names = sweep.environments[dataset]
        self.asked = sweep.asked[dataset, kind]
        planned = [run for run in sweep.plan.runs.values() if run.key.dataset == dataset] if sweep.plan else []
        planned = [run for run in planned if run.kind == kind]
        runs = [run for run in sweep.runs if (run.key.dataset, run.kind) == (dataset, kind)]
        keys = [*(run.key for run in planned if not run.is_teacher), *(run.key for run in runs)]
        self.algorithms = order_algorithms(sweep.plan, (key.algorithm for key in keys))
        self.planned_teachers = {run.key.algorithm for run in planned if run.is_teacher}
        self.trials = sorted({key.trial_seed for key in keys})
        self.missing = [m for m in sweep.missing if (m.planned.key.dataset, m.planned.kind) == (dataset, kind)]
        self.settings = {name: self._describe_settings(name, runs) for name in self.algorithms}

    def _describe_settings(self, algorithm: str, runs: Sequence[Run]) -> dict[Setting, str | None]:
        """Return the settings of an algorithm's rows; what is not done joins the first row that was given the same."""
        found = [run.setting for run in runs if run.key.algorithm == algorithm]
        lone = [
            planned.given
            for planned, _ in self.missing
            if (planned.is_teacher, planned.key.algorithm) == (False, algorithm)
            and not any(is_given(setting, planned.given) for setting in found)
        ]
        return describe_settings([*found, *lone])

    def build(self) -> Iterator[Table]:
        held_out = tuple(self.names[env] for env in self.asked.held_out)
        for selection in SELECTIONS:
            choices = {
                (group.algorithm, group.setting, (group.source, group.test_env), group.trial_seed): choice
                for group, runs in self.groups.items()
                if (choice := choose(selection, runs, group.test_env, group.held_out))
            }
            students = [
                self._build_student(selection, name, setting, text, source, choices)
                for name in self.algorithms
                for setting, text in self.settings[name].items()
                for source in self.asked.sources
            ]
            rows = students + self._build_teachers(choices)
            is_asked = self.asked.has_pairs or selection != "leave-one-domain-out"
            yield Table(self.dataset, selection, self.names, rows, is_asked, self.kind, held_out)

    def _build_student(
        self, selection: str, algorithm: str, setting: Setting, text: str | None, source: int | None, choices: Choices
    ) -> Row:
        def build(env: int, held_out: Held) -> Cell:
            key = (algorithm, setting, (source, env))
            found = [choice for trial in self.trials if (choice := choices.get((*key, trial)))]
            numbers = [Number(100 * choice.test_acc, choice, None) for choice in found]
            is_crossed = selection == "leave-one-domain-out"
            missing = [
                m
                for m in self.missing
                if (m.planned.is_teacher, m.planned.key.algorithm) == (False, algorithm)
                and self._find_setting(algorithm, m.planned.given) == setting
                and (
                    m.planned.key.test_envs == held_out
                    or (is_crossed and env in m.planned.key.test_envs and len(m.planned.key.test_envs) == 2)
                )
            ]
            why = "no run that shares a step with all its pairs of held-out domains" if is_crossed else "no run"
            return self._make_cell(env, held_out, numbers, missing, lambda trial: why)

        return self._make_row(algorithm, "student", text, source, build)

    def _find_setting(self, algorithm: str, given: Setting) -> Setting:
        settings = self.settings[algorithm]
        return next((setting for setting in settings if is_given(setting, given)), given)

    def _make_row(
        self, algorithm: str, role: str, setting: str | None, source: int | None, build: Callable[[int, Held], Cell]
    ) -> Row:
        cells = []
        for env, domain in enumerate(self.names):
            held_out = self.asked.cells.get((source, env))
            cells.append(Cell(domain, [], [], "", is_asked=False) if held_out is None else build(env, held_out))
        runs = [run for cell in cells for number in cell.numbers if (run := get_run(number))]
        commits = dict.fromkeys(str(run.machine["commit"]) for run in runs if run.machine.get("commit"))
        origin = None if source is None else self.names[source]
        origins = {text for cell in cells for number in cell.numbers for text in list_origins(number)}
        return Row(algorithm, role, cells, setting, origin, tuple(sorted(commits)), tuple(sorted(origins)))

    def _build_teachers(self, choices: Choices) -> list[Row]:
        """Build the rows of all teachers that are planned, or stand behind a chosen student."""
        behind: Behind = {}
        for (_, _, place, trial), choice in sorted(choices.items(), key=lambda item: self._rank(item[0])):
            for teacher in trace_teachers(self.sweep, choice.run):
                behind.setdefault((place, trial), []).append((choice, teacher, _get_networks(teacher)))
        networks: dict[str, list[Setting]] = {name: [] for name in self.planned_teachers}
        for found in behind.values():
            for _, teacher, network in found:
                networks.setdefault(teacher.algorithm, []).append(network)
        return [
            self._build_teacher(name, setting, text, source, behind)
            for name in order_algorithms(None, networks)
            for setting, text in (describe_settings(networks[name]) or _ALONE).items()
            for source in self.asked.sources
        ]

    def _rank(self, key: tuple[str, Setting, Place, int]) -> tuple[Any, ...]:
        algorithm, setting, (source, env), trial = key
        row = (self.algorithms.index(algorithm), list(self.settings[algorithm]).index(setting))
        return (*row, -1 if source is None else source, env, trial)

    def _build_teacher(
        self, algorithm: str, setting: Setting, text: str | None, source: int | None, behind: Behind
    ) -> Row:
        def build(env: int, held_out: Held) -> Cell:
            own = {
                trial: [
                    (choice, teacher)
                    for choice, teacher, network in behind.get(((source, env), trial), [])
                    if (teacher.algorithm, network) == (algorithm, setting)
                ]
                for trial in self.trials
            }
            found = [_find_teacher(env, pairs) for pairs in own.values()]
            missing = [
                m
                for m in self.missing
                if (m.planned.is_teacher, m.planned.key.algorithm) == (True, algorithm)
                and m.planned.key.test_envs == held_out
            ]
            whys = {trial: "its accuracy is not recorded" for trial, pairs in own.items() if pairs}
            numbers = [number for number in found if number]
            return self._make_cell(
                env, held_out, numbers, missing, lambda trial: whys.get(trial, "no student of it is done")
            )

        return self._make_row(algorithm, "teacher", text, source, build)

    def _make_cell(
        self, env: int, held_out: Held, numbers: list[Number], missing: list[Missing], explain: Callable[[int], str]
    ) -> Cell:
        by_reason: dict[str, list[str]] = {}
        for planned, reason in missing:
            pair = [self.names[e] for e in planned.key.test_envs if e not in held_out and e < len(self.names)]
            where = f"trial {planned.key.trial_seed}, hparams_seed {planned.key.hparams_seed}"
            by_reason.setdefault(reason, []).append(where + "".join(f", with {other} held out too" for other in pair))
        explained = {m.planned.key.trial_seed for m in missing} | {n.choice.run.key.trial_seed for n in numbers}
        for trial in self.trials:
            if trial not in explained:
                by_reason.setdefault(explain(trial), []).append(f"trial {trial}")
        gap = "; ".join(f"{reason} ({_shorten(places)})" for reason, places in by_reason.items())
        others = [self.names[e] for e in held_out if e != env] if self.kind == LEAVE_OUT else []
        name, with_others = self.names[env], " and ".join(others)
        return Cell(name, [number.accuracy for number in numbers], numbers, gap, with_others)


def list_origins(number: Number) -> list[str]:
    """Return what the networks behind a number start from, as it was recorded."""
    return read_origins(number.teacher.recorded) if number.teacher else number.choice.run.origins


def _get_networks(teacher: TracedTeacher) -> Setting:
    """Return which network a teacher has, as far as it is known."""
    run = teacher.run
    return read_networks(run.hparams, {}) if run else ()


def _find_teacher(env: int, behind: Sequence[tuple[Choice, TracedTeacher]]) -> Number | None:
    """Find the teacher that its row shows, among those behind chosen students."""
    found = [
        (rank_student(choice.run, teacher), Number(100 * acc, choice, teacher))
        for choice, teacher in behind
        if (acc := teacher.read_acc(env)) is not None
    ]
    return min(found, key=lambda entry: entry[0])[1] if found else None


def _shorten(places: list[str], most: int = 3) -> str:
    rest = [f"and {len(places) - most} more"] if len(places) > most else []
    return "; ".join(places[:most] + rest)


def read_hparams(run: Run) -> dict[str, Any]:
    """Return a run's hyperparameters by name; a path into the sweep is relative to it."""
    return {
        name: cut_sweep_path(value, run.root, run) if isinstance(value, str) else value
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

    A data set's number is the mean over trials of the trial's average; a trial counts when it has every domain that was
    asked for, of single sources from every source.
    """
    tables = []
    for kind in dict.fromkeys(table.kind for table in results.tables):
        own = [table for table in results.tables if table.kind == kind]
        datasets = list(dict.fromkeys(table.dataset for table in own))
        for selection in SELECTIONS if len(datasets) > 1 else ():
            parts = [table for table in own if table.selection == selection]
            if not parts or not all(table.is_asked for table in parts):
                continue
            names: dict[str, dict[tuple[str, str | None], None]] = {"student": {}, "teacher": {}}
            for row in (row for table in parts for row in table.rows):
                names[row.role][row.algorithm, row.setting] = None
            rows = [
                make_mean(
                    [_average_row(table, name, role, setting) for table in parts],
                    [row for table in parts for row in table.rows if row.is_of(name, role, setting)],
                )
                for role in names
                for name in order_algorithms(
                    results.sweep.plan if role == "student" else None, [name for name, _ in names[role]]
                )
                for other, setting in names[role]
                if other == name
            ]
            shown = [table.name for table in parts]
            tables.append(Table("Averages", selection, shown, rows, True, kind, tuple(datasets)))
    return tables


def _average_row(table: Table, algorithm: str, role: str, setting: str | None) -> Cell:
    rows = [row for row in table.rows if row.is_of(algorithm, role, setting)]
    if not rows:
        return Cell(table.dataset, [], [], "not in this data set's sweep")
    cells = [cell for row in rows for cell in row.asked]
    by_row = [row.list_trials() for row in rows]
    trials = sorted(set.intersection(*map(set, by_row)))
    complete = [fmean(acc for trials_ in by_row for acc in trials_[trial]) for trial in trials]
    gap = "some held-out domains are missing, see its table" if any(cell.gap for cell in cells) else ""
    return Cell(table.dataset, complete, [], gap)
