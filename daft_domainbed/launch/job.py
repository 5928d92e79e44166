"""One job of a sweep: a run, what it is for, and what has to be there before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.methods import QUESTIONS, STUDENT


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        stage: What it is for: "student", "<kind>_teacher", "evaluation" or "adaptation".
        folder: Its output folder, relative to the sweep's where it lies inside.
        args: Its arguments.
        needs: Folders of the teachers that have to be there before.
        imports: What adds the user's own algorithms: modules, or paths of scripts.
        cwd: The folder that relative paths in its hyperparameters count from; the process's own where it is gone.
    """

    stage: str
    folder: str
    args: TrainArgs
    needs: list[str] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)
    cwd: str = ""


@dataclass(frozen=True)
class EvaluationJob(Job):
    """The evaluation, or the adaptation, of one checkpoint of a sweep; `args` are those of the run that made it.

    Attributes:
        checkpoint: Its file, relative to the sweep's folder where it lies inside.
        asked: The arguments of `evaluate`, or of `adapt`, that are not its own.
    """

    checkpoint: str = ""
    asked: dict[str, Any] = field(default_factory=dict)


def group_by_depth(jobs: Iterable[Job]) -> list[list[Job]]:
    """Return jobs in groups, each of which needs only those before it; students come last, all in one group."""
    jobs = list(jobs)
    by_folder = {job.folder: job for job in jobs}

    def measure(job: Job) -> int:
        return 1 + max((measure(by_folder[need]) for need in job.needs if need in by_folder), default=-1)

    groups: dict[tuple[bool, int], list[Job]] = {}
    for job in jobs:
        is_student = job.stage == STUDENT
        groups.setdefault((is_student, 0 if is_student else measure(job)), []).append(job)
    return [groups[key] for key in sorted(groups)]


def name_job(job: Job) -> str:
    """Return what a job makes.

    Example:
        >>> name_job(EvaluationJob("evaluation", "0/evaluation", TrainArgs(algorithm="KD")))
        'KD evaluation'

        >>> name_job(Job("aft_teacher", "teachers/AFT-0", TrainArgs(algorithm="AFT")))
        'AFT teacher'
    """
    if job.stage in QUESTIONS:
        return f"{job.args.algorithm} {job.stage}"
    return f"{job.args.algorithm} teacher" if job.stage.endswith("_teacher") else job.stage
