"""Kinds of jobs, which take about the same time and room: what they are called, how long those left will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from daft_domainbed.launch.job import Job, name_job
from daft_domainbed.methods import STUDENT


def name_kind(job: Job) -> str:
    """Return what a job is, without its seeds.

    Example:
        >>> from daft_domainbed.arguments import TrainArgs
        >>> name_kind(Job("student", "0", TrainArgs("PACS", "KD")))
        'KD, PACS'
        >>> name_kind(Job("erm_teacher", "1", TrainArgs("PACS", "ERM")))
        'ERM teacher, PACS'
    """
    what = job.args.algorithm if job.stage == STUDENT else name_job(job)
    return f"{what}, {job.args.dataset}"


def estimate_seconds(left: Mapping[str, float], took: Mapping[str, Sequence[float]]) -> float | None:
    """Return the seconds of work left, from the mean of the finished jobs of each kind; None while a kind has none.

    Args:
        left: How many jobs of each kind are left; a part of a job counts as such.
        took: Seconds of the finished jobs of each kind.

    Example:
        >>> estimate_seconds({"ERM": 1.5, "KD": 0}, {"ERM": [10.0, 30.0]})
        30.0
    """
    kinds = [kind for kind, count in left.items() if count > 0]
    if any(not took.get(kind) for kind in kinds):
        return None
    return sum((left[kind] * sum(took[kind]) / len(took[kind]) for kind in kinds), 0.0)


def name_cause(failure: str) -> str:
    """Return what is the same where one cause fails many jobs.

    Example:
        >>> name_cause("its teacher teachers/ERM-0a1b failed")
        'its teacher failed'
        >>> name_cause("the disk is full")
        'the disk is full'
    """
    return "its teacher failed" if failure.startswith("its teacher ") and failure.endswith(" failed") else failure
