"""What is asked of a sweep's models: of those that training-domain validation chose, and of the teachers behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from daft_domainbed.adaptation.adapt import AdaptArgs, name_folder
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.errors import UsageError
from daft_domainbed.launch.job import EvaluationJob, Job
from daft_domainbed.launch.plan_file import read_jobs
from daft_domainbed.methods import ADAPTATION, EVALUATION
from daft_domainbed.results.lineage import trace_teachers
from daft_domainbed.results.selection import Choice, choose, group_runs
from daft_domainbed.results.sweeps import Sweep, read_sweep
from daft_domainbed.runtime.files import write_text
from daft_domainbed.runtime.layout import (
    BEST_CHECKPOINT_FILE,
    CHECKPOINT_FILE,
    DONE_FILE,
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
    return [
        _make_job(EVALUATION, run, f"{run.folder}/{EVALUATION_FOLDER}", name, asked) for run, name in _find_chosen(root)
    ]


def plan_adaptations(root: Path, asked: Mapping[str, Any]) -> list[EvaluationJob]:
    """Return the jobs that adapt the chosen checkpoints of a sweep, to each domain that they held out.

    Args:
        root: Of the sweep.
        asked: The arguments of `adapt` that all have in common.

    Raises:
        UsageError: Nothing is chosen yet, or a chosen checkpoint is gone.
    """
    jobs = []
    for run, name in _find_chosen(root):
        for env in run.args.test_envs:
            args = AdaptArgs(name, env, **asked)
            folder = f"{run.folder}/{name_folder(env, args.strong_ood, args.strong_ratio)}"
            jobs.append(_make_job(ADAPTATION, run, folder, name, {**asked, "test_env": env}))
    return jobs


def _find_chosen(root: Path) -> list[tuple[Job, str]]:
    """Return the run and the file of every chosen checkpoint, students before teachers."""
    runs = {job.folder: job for job in read_jobs(root)}
    checkpoints: dict[str, str] = {}
    for folder, name in _list_chosen(read_sweep(root)):
        if folder in runs:
            checkpoints.setdefault(folder, name)
        else:  # copied here from another sweep
            print(f"{root / folder} is in no plan: ask 'daft-domainbed evaluate' or 'adapt' of it", file=sys.stderr)
    if not checkpoints:
        raise UsageError(f"{root} has no run that is done: launch the sweep first")
    places = [root / folder / name for folder, name in checkpoints.items()]
    if gone := [place for place in places if not place.is_file()]:
        raise UsageError(f"{gone[0]} was chosen and is gone ({len(gone)} in all): launch without --skip_model_save")
    return [(runs[folder], name) for folder, name in checkpoints.items()]


def write_evaluations(root: Path, jobs: list[EvaluationJob]) -> None:
    """Store the jobs in the sweep's folder beside those that are there, where other machines find them.

    Raises:
        UsageError: The folder holds evaluations that were asked otherwise.
    """
    before = {job.folder: job for job in read_evaluations(root)}
    for job in jobs:
        if job.folder not in before:
            # Where a single command was at work there may be less than is asked; what there is is not done again.
            (root / job.folder / DONE_FILE).unlink(missing_ok=True)
        elif (root / job.folder).is_dir():
            _compare(root / job.folder, before[job.folder], job)
    everything = before | {job.folder: job for job in jobs}
    content = {"schema": 1, "jobs": [asdict(job) for job in everything.values()]}
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
    groups = group_runs(sweep).items()
    chosen = (choose(SELECTION, runs, group.test_env, group.held_out) for group, runs in groups)
    choices = [choice for choice in chosen if choice]
    for choice in choices:
        yield choice.run.folder, find_checkpoint(choice)
    for choice in choices:
        for teacher in trace_teachers(sweep, choice.run):
            if teacher.run is not None:
                yield teacher.run.folder, CHECKPOINT_FILE


def _make_job(stage: str, run: Job, folder: str, name: str, asked: Mapping[str, Any]) -> EvaluationJob:
    return EvaluationJob(
        stage,
        folder,
        run.args,
        imports=run.imports,
        cwd=run.cwd,
        checkpoint=f"{run.folder}/{name}",
        asked=dict(asked),
    )
