"""The report of a sweep: one HTML file that needs no network, a function of the records alone."""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daft_domainbed._version import __version__
from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.results.cells import Number, Table
from daft_domainbed.results.charts import draw_curves, draw_teachers_and_students
from daft_domainbed.results.costs import add_up_costs
from daft_domainbed.results.lineage import TracedTeacher, trace_teachers
from daft_domainbed.results.records import Run
from daft_domainbed.results.robustness_charts import draw_robustness
from daft_domainbed.results.selection import SELECTION_WORDS
from daft_domainbed.results.sweeps import Sweep, read_sweeps
from daft_domainbed.results.tables import Results, average_datasets, build_results, read_hparams
from daft_domainbed.results.typesetting import NOTHING, lay_out, say_not_asked
from daft_domainbed.runtime.durations import format_duration


def write_report(input_dirs: Path | Sequence[Path], output: Path) -> Path:
    """Write the report of sweeps (or of single runs) and return its path.

    Raises:
        UsageError: There is nothing to report on, or the file cannot be written.
        RunError: The disk is full.
    """
    html = render(build_results(read_sweeps([input_dirs] if isinstance(input_dirs, Path) else input_dirs)))
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
    environment.filters["duration"] = _write_duration
    sweep = results.sweep
    runs = _RunList(sweep)
    sections = [
        {
            "name": dataset,
            "panels": [
                _describe_table(t, runs, number) for number, t in enumerate(results.tables) if t.dataset == dataset
            ],
            "curves": draw_curves(first := next(t for t in results.tables if t.dataset == dataset)),
            "robustness": draw_robustness(first, sweep),
        }
        for dataset in dict.fromkeys(table.dataset for table in results.tables)
    ]
    return environment.get_template("report.html").render(
        title=sweep.name,
        version=__version__,
        facts=_count(sweep),
        selections=SELECTION_WORDS,
        sections=sections,
        averages=[_describe_table(table, runs, -i) for i, table in enumerate(average_datasets(results), 1)],
        runs=[_describe_run(sweep, run, number) for number, run in enumerate(runs.runs.values())],
        costs=add_up_costs(sweep),
        machines=_list_machines(sweep),
        missing=sweep.missing,
        environments=sweep.environments,
        notes=sweep.notes,
        has_plan=sweep.plan is not None,
    )


def _count(sweep: Sweep) -> list[tuple[str, str]]:
    jobs = len(sweep.plan.runs) if sweep.plan else 0
    done = ("jobs done", f"{jobs - len(sweep.missing):,} of {jobs:,}") if jobs else ("runs", f"{len(sweep.runs):,}")
    records = sum(len(run.steps) for run in [*sweep.runs, *sweep.teachers.values()])
    return [
        done,
        ("data sets", f"{len({run.key.dataset for run in sweep.runs}):,}"),
        ("trials", f"{len({run.key.trial_seed for run in sweep.runs}):,}"),
        ("hyperparameter draws", f"{len({run.key.hparams_seed for run in sweep.runs}):,}"),
        ("records", f"{records:,}"),
    ]


class _RunList:
    """The runs behind the numbers, each to be described once."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.runs: dict[str, Run] = {}
        self._numbers: dict[str, int] = {}

    def number(self, run: Run) -> int:
        """Return a run's place in the list, which it and its teachers join."""
        for one in (run, *(teacher.run for teacher in trace_teachers(self.sweep, run))):
            if one and one.folder not in self._numbers:
                self._numbers[one.folder] = len(self.runs)
                self.runs[one.folder] = one
        return self._numbers[run.folder]


def _describe_table(table: Table, runs: _RunList, number: int) -> dict[str, Any]:
    """Return all that the template shows of one table; `number` makes its anchors unique in the page."""
    words = SELECTION_WORDS[table.selection]
    if not table.is_asked:
        return {"selection": table.selection, "words": words, "not_asked": say_not_asked(table)}
    layout = lay_out(table)
    rows, details = [], []
    for i, line in enumerate(layout.lines):
        means = [*(cell.mean for cell in line.row.cells), line.row.average]
        behind = [*(cell.numbers for cell in line.row.cells), []]
        cells = []
        for j, (text, error, best, footnote) in enumerate(line.entries):
            anchor = f"n{number}-{i}-{j}" if behind[j] else ""
            cells.append(
                {"id": anchor, "value": means[j], "text": text, "error": error, "best": best, "footnote": footnote}
            )
            if anchor:
                title = f"{line.row.label} on {table.environments[j]}"
                numbers = [_describe_number(n, runs) for n in behind[j]]
                details.append({"id": anchor, "title": title, "text": f"{text} {error}", "numbers": numbers})
        rows.append({"label": line.row.name + line.row.origin, "role": line.row.role, "cells": cells})
    return {
        "selection": table.selection,
        "words": words,
        "not_asked": "",
        "columns": [*table.environments, "average"],
        "caption": layout.caption + (f" Networks: {layout.sizes}." if layout.sizes else ""),
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
        "command": write_command(run.args),
        "hparams": [(name, json.dumps(value)) for name, value in read_hparams(run).items()],
        "teachers": [_describe_teacher(teacher, run) for teacher in trace_teachers(sweep, run)],
        "seconds": _write_duration(run.seconds),
        "machine": ", ".join(f"{name} {value}" for name, value in sorted(run.machine.items())),
    }


def _describe_teacher(teacher: TracedTeacher, run: Run) -> dict[str, Any]:
    accs = {env: teacher.read_acc(env) for env in run.key.test_envs}
    slot = "" if teacher.slot == "teacher" else f" ({teacher.slot})"
    return {
        "role": ("Teacher" if teacher.generation == 1 else "Its teacher") + slot,
        "algorithm": teacher.algorithm,
        "id": teacher.id,
        "accuracy": ", ".join(f"{100 * acc:.2f}" for acc in accs.values() if acc is not None),
        "sha256": str(teacher.recorded.get("sha256", "")),
        "steps": teacher.recorded.get("steps"),
    }


def write_command(args: Mapping[str, Any]) -> str:
    """Write the command that trains a run, from its recorded arguments.

    A run that this package's engine recorded is trained by its own command, any other by DomainBed's script.
    """
    first = ["dataset", "algorithm", "test_envs", "trial_seed", "hparams_seed"]
    names = first + sorted(args.keys() - {*first})
    program = "daft-domainbed train" if "host" in args else "python -m domainbed.scripts.train"
    words = program.split()
    for name in names:
        value = args[name]
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        elif isinstance(value, dict):
            words += [f"--{name}", json.dumps(value)]
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _list_machines(sweep: Sweep) -> list[tuple[str, list[tuple[str, int]]]]:
    """List versions and hardware: of each recorded fact the values, and how many runs have them."""
    machines = [run.machine for run in [*sweep.runs, *sweep.teachers.values()] if run.machine]
    facts: dict[str, Counter[str]] = {}
    for machine in machines:
        for name, value in machine.items():
            facts.setdefault(name, Counter())[str(value)] += 1
    return [
        (name, sorted(counts.items(), key=lambda item: (-item[1], item[0]))) for name, counts in sorted(facts.items())
    ]


def _write_duration(seconds: float | None) -> str:
    return NOTHING if seconds is None else format_duration(seconds)
