"""The evaluations of a sweep: every checkpoint that training-domain validation chose, and the teachers behind them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.errors import UsageError
from daft_domainbed.launch.job import EvaluationJob, Job
from daft_domainbed.launch.plan_file import read_jobs
from daft_domainbed.methods import EVALUATION
from daft_domainbed.results.lineage import trace_teachers
from daft_domainbed.results.selection import Choice, choose, group_runs
from daft_domainbed.results.sweeps import Sweep, read_sweep
from daft_domainbed.runtime.files import write_text
from daft_domainbed.runtime.layout import (
    BEST_CHECKPOINT_FILE,
    CHECKPOINT_FILE,
    EVALUATION_FOLDER,
    EVALUATIONS_FILE,
)

SELECTION = "training-domain"


def plan_evaluations(root: Path, asked: Mapping[str, Any]) -> list[EvaluationJob]:
    """Return the jobs that evaluate the chosen checkpoints of a sweep, students before teachers.

    Args:
        root: Of the sweep.
        asked: The arguments of `evaluate` that all have in common.

    Raises:
        UsageError: Nothing is chosen yet, or a chosen checkpoint is gone.
    """
    runs = {job.folder: job for job in read_jobs(root)}
    checkpoints: dict[str, str] = {}
    for folder, name in _list_chosen(read_sweep(root)):
        checkpoints.setdefault(folder, name)
    if not checkpoints:
        raise UsageError(f"{root} has no run that is done: launch the sweep first")
    places = [root / folder / name for folder, name in checkpoints.items()]
    if gone := [place for place in places if not place.is_file()]:
        raise UsageError(f"{gone[0]} was chosen and is gone ({len(gone)} in all): launch without --skip_model_save")
    return [_make_job(runs[folder], folder, name, asked) for folder, name in checkpoints.items()]


def write_evaluations(root: Path, jobs: list[EvaluationJob]) -> None:
    """Store the jobs in the sweep's folder, where other machines find them.

    Raises:
        UsageError: The folder holds evaluations that were asked otherwise.
    """
    before = {job.folder: job for job in read_evaluations(root)}
    for job in jobs:
        if job.folder in before and (root / job.folder).is_dir():
            _compare(root / job.folder, before[job.folder], job)
    content = {"schema": 1, "jobs": [asdict(job) for job in jobs]}
    write_text(root / EVALUATIONS_FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _compare(folder: Path, old: EvaluationJob, new: EvaluationJob) -> None:
    theirs, ours = ({"checkpoint": job.checkpoint} | job.asked for job in (old, new))
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise UsageError(
                f"{folder} was begun with {name} {theirs.get(name)}, not {value}: give the same, or delete that folder"
            )


def read_evaluations(root: Path) -> list[EvaluationJob]:
    """Return the stored evaluations of a sweep; none where none were asked for.

    Raises:
        UsageError: The file cannot be read.
    """
    path = root / EVALUATIONS_FILE
    if not path.is_file():
        return []
    try:
        jobs = json.loads(path.read_text())["jobs"]
        return [EvaluationJob(**job | {"args": TrainArgs(**job["args"])}) for job in jobs]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is no list of evaluations ({error}): delete it, and evaluate again") from error


def find_checkpoint(choice: Choice) -> str:
    """Return the file of a chosen checkpoint: the last one of its run, or the best by training-domain validation."""
    return CHECKPOINT_FILE if choice.step == choice.run.steps[-1] else BEST_CHECKPOINT_FILE


def _list_chosen(sweep: Sweep) -> Iterator[tuple[str, str]]:
    """Yield folder and file of every chosen student, then of every teacher behind one that lies in the sweep."""
    chosen = (choose(SELECTION, runs, group.test_env) for group, runs in group_runs(sweep.runs).items())
    choices = [choice for choice in chosen if choice]
    for choice in choices:
        yield choice.run.folder, find_checkpoint(choice)
    for choice in choices:
        for teacher in trace_teachers(sweep, choice.run):
            if teacher.run is not None:
                yield teacher.run.folder, CHECKPOINT_FILE


def _make_job(run: Job, folder: str, name: str, asked: Mapping[str, Any]) -> EvaluationJob:
    return EvaluationJob(
        EVALUATION,
        f"{folder}/{EVALUATION_FOLDER}",
        run.args,
        imports=run.imports,
        cwd=run.cwd,
        checkpoint=f"{folder}/{name}",
        asked=dict(asked),
    )
