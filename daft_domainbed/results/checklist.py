"""What reviewers ask of every number: how many trials and steps, which hyperparameters were searched, what it cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from daft_domainbed.results.cells import Table
from daft_domainbed.results.comparison import collect_trials
from daft_domainbed.results.draws import list_chosen, list_varying
from daft_domainbed.results.grids import Grid, to_csv, to_markdown, to_text, to_wrapped_latex
from daft_domainbed.results.plans import order_algorithms
from daft_domainbed.results.records import Run
from daft_domainbed.results.settings import describe_settings, name_row
from daft_domainbed.results.sweeps import Sweep
from daft_domainbed.results.tables import Results
from daft_domainbed.results.typesetting import NOTHING
from daft_domainbed.runtime.durations import format_duration
from daft_domainbed.runtime.sizes import format_size, read_size


@dataclass(frozen=True)
class Entry:
    """What is to be said of the runs of one algorithm on one data set.

    Attributes:
        dataset: Its name in print.
        algorithm: Its name.
        role: "student" or "teacher".
        n_trials: Trials that have every held-out domain; None for teachers.
        n_domains: Domains that are held out in turn.
        jobs: Runs.
        steps: Updates of a run, each number that there is.
        evaluations: Of a run.
        draws: Hyperparameter draws for each trial and held-out domain, the defaults among them.
        searched: Hyperparameters that differ between draws.
        chosen: How those behind the table were chosen.
        parameters: Of the network; None where not recorded.
        multiply_adds: Of the network for one image; None where not recorded.
        seconds: Median wall time of a run; None where not recorded.
        total_seconds: Of all runs.
    """

    dataset: str
    algorithm: str
    role: str
    n_trials: int | None
    n_domains: int
    jobs: int
    steps: list[int]
    evaluations: int
    draws: int
    searched: list[str]
    chosen: str
    parameters: int | None
    multiply_adds: int | None
    seconds: float | None
    total_seconds: float | None


@dataclass(frozen=True)
class Checklist:
    """The entries of a sweep, and what holds for all of them."""

    entries: list[Entry]
    notes: list[str]


def build_checklist(results: Results) -> Checklist:
    """Return what the records of a sweep say."""
    sweep = results.sweep
    first = {(table.dataset, table.kind): table for table in reversed(results.tables) if table.is_asked}
    tables = [*reversed(first.values())]
    named = [table.dataset for table in tables]
    entries = [
        entry
        for i, table in enumerate(tables)
        for entry in _describe(sweep, table, has_teachers=table.dataset not in named[:i])
    ]
    return Checklist(entries, _list_notes(sweep))


def _describe(sweep: Sweep, table: Table, *, has_teachers: bool) -> Iterator[Entry]:
    students = [run for run in sweep.runs if (run.key.dataset, run.kind) == (table.dataset, table.kind)]
    for name in order_algorithms(sweep.plan, (run.key.algorithm for run in students)):
        own = [run for run in students if run.key.algorithm == name]
        for setting, text in describe_settings(run.setting for run in own).items():
            label = name_row(name, text)
            runs = [run for run in own if run.setting == setting]
            yield _describe_runs(table, label, "student", runs, sweep, len(collect_trials(table, label)))
    teachers = [run for run in sweep.teachers.values() if has_teachers and run.key.dataset == table.dataset]
    for name in order_algorithms(None, (run.key.algorithm for run in teachers)):
        yield _describe_runs(
            table, name, "teacher", [run for run in teachers if run.key.algorithm == name], sweep, None
        )


def _describe_runs(
    table: Table, name: str, role: str, runs: Sequence[Run], sweep: Sweep, n_trials: int | None
) -> Entry:
    algorithm = runs[0].key.algorithm
    draws = len({run.key.hparams_seed for run in runs})
    seconds = [run.seconds for run in runs if run.seconds is not None]
    parameters, multiply_adds = read_size(runs[0].first)
    is_search = role == "student" and draws > 1
    chosen = "as given"
    if role == "student":
        chosen = "by validation, in each trial and domain" if is_search else _name_chosen(sweep, algorithm)
    return Entry(
        dataset=table.name,
        algorithm=name,
        role=role,
        n_trials=n_trials,
        n_domains=len({run.key.test_envs for run in runs}),
        jobs=len(runs),
        steps=sorted({int(run.steps[-1]) + 1 for run in runs}),
        evaluations=int(median(len(run.steps) for run in runs)),
        draws=draws,
        searched=list_varying(runs) if is_search else [],
        chosen=chosen,
        parameters=parameters,
        multiply_adds=multiply_adds,
        seconds=median(seconds) if seconds else None,
        total_seconds=sum(seconds) if seconds else None,
    )


def _name_chosen(sweep: Sweep, algorithm: str) -> str:
    """Return what another sweep chose for an algorithm, if one did."""
    own = [line.strip() for line in list_chosen(sweep)]
    found = [line.partition(": ")[2] for line in own if line.partition(":")[0].split(" on ")[0] == algorithm]
    return "; ".join(found) or "defaults"


def _list_notes(sweep: Sweep) -> list[str]:
    notes = ["n: trials, each with its own split, that have every held-out domain"]
    fractions = {run.args.get("holdout_fraction") for run in sweep.runs}
    shares = sorted(100 * value for value in fractions if isinstance(value, float))
    notes += (
        [f"put aside for validation: {', '.join(f'{share:g} %' for share in shares)} of a domain"] if shares else []
    )
    given = {args.get("hparams") for args in sweep.plan.list_args()} if sweep.plan else set()
    texts = sorted(text for text in given if isinstance(text, str))
    notes += [f"set by hand: {' and '.join(texts)}"] if texts else []
    machines = [run.machine for run in sweep.runs if run.machine]
    for name in ("commit", "torch", "cpu", "gpu"):
        values = sorted({str(machine[name]) for machine in machines if machine.get(name)})
        notes += [f"{name}: {', '.join(values)}"] if values else []
    origins = dict.fromkeys(f"{run.key.algorithm} rests on {text}" for run in sweep.runs for text in run.origins)
    notes += list(origins)
    notes += [f"{len(sweep.missing)} planned jobs are not done"] if sweep.missing else []
    return notes


def lay_out_checklist(checklist: Checklist) -> list[Grid]:
    """Return a table a data set, ready for print."""
    head = [
        "",
        "n",
        "domains",
        "jobs",
        "steps",
        "evaluations",
        "draws",
        "searched",
        "chosen",
        "network",
        "a job",
        "in all",
    ]
    grids = []
    for dataset in dict.fromkeys(entry.dataset for entry in checklist.entries):
        rows = [_write_entry(entry) for entry in checklist.entries if entry.dataset == dataset]
        caption = f"{dataset}: how the numbers came about. {'; '.join(checklist.notes)}."
        grids.append(Grid(dataset, caption, head, rows))
    return grids


def _write_entry(entry: Entry) -> list[str]:
    def time(seconds: float | None) -> str:
        return NOTHING if seconds is None else format_duration(seconds)

    return [
        entry.algorithm if entry.role == "student" else f"{entry.algorithm} teacher",
        NOTHING if entry.n_trials is None else str(entry.n_trials),
        str(entry.n_domains),
        str(entry.jobs),
        ", ".join(map(str, entry.steps)),
        str(entry.evaluations),
        str(entry.draws) if entry.role == "student" else NOTHING,
        ", ".join(entry.searched) or "none",
        entry.chosen,
        format_size(entry.parameters, entry.multiply_adds) or NOTHING,
        time(entry.seconds),
        time(entry.total_seconds),
    ]


def _to_csv(checklist: Checklist) -> str:
    rows: list[dict[str, Any]] = [asdict(entry) for entry in checklist.entries]
    head = list(Entry.__dataclass_fields__)
    lists = ({name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in row.items()} for row in rows)
    return to_csv(head, ([row[name] for name in head] for row in lists))


FORMATS: dict[str, Callable[[Checklist], str]] = {
    "text": lambda checklist: to_text(lay_out_checklist(checklist)),
    "markdown": lambda checklist: to_markdown(lay_out_checklist(checklist)),
    "latex": lambda checklist: to_wrapped_latex(lay_out_checklist(checklist)),
    "csv": _to_csv,
    "json": lambda checklist: json.dumps(asdict(checklist), indent=1) + "\n",
}
