"""How the jobs of a sweep stand, read from their folders alone: whoever launched them, wherever they run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from daft_domainbed.launch.job import Job
from daft_domainbed.runtime.layout import (
    DONE_FILE,
    FAILED_FILE,
    JOURNAL_FILE,
    RESUME_FILE,
    read_failure,
    read_last_record,
)
from daft_domainbed.runtime.locks import is_claimed

Kind = Literal["done", "running", "incomplete", "failed", "waiting", "not launched"]
KINDS: tuple[Kind, ...] = ("done", "running", "incomplete", "failed", "waiting", "not launched")


@dataclass(frozen=True)
class State:
    """How a job stands.

    Attributes:
        kind: "waiting" for a teacher that is not done; "incomplete" goes on where it was at the next launch.
        reason: The first line of why it failed.
        step: The last one that has a record.
        seconds: What it took, once it is done.
    """

    kind: Kind
    reason: str = ""
    step: int | None = None
    seconds: float | None = None


def is_done(folder: Path) -> bool:
    """Return whether a run is complete."""
    return (folder / DONE_FILE).is_file()


def write_failure(folder: Path, reason: str) -> None:
    """Write why a job failed into its folder, where `status` and the tables find it."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILED_FILE).write_text(reason + "\n", encoding="utf-8", errors="backslashreplace")


def forget_failures(root: Path, jobs: Iterable[Job]) -> None:
    """Forget why jobs failed, so that they are tried again; those that another process is at are left alone."""
    for job in jobs:
        if not is_claimed(root / job.folder):
            (root / job.folder / FAILED_FILE).unlink(missing_ok=True)


def read_states(root: Path, jobs: Iterable[Job]) -> dict[str, State]:
    """Return how each job stands, by folder."""
    jobs = list(jobs)
    done = {job.folder for job in jobs if is_done(root / job.folder)}
    return {job.folder: _read_state(root, job, done) for job in jobs}


def _read_state(root: Path, job: Job, done: set[str]) -> State:
    folder = root / job.folder
    if job.folder in done:
        seconds: Any = read_last_record(folder).get("seconds")
        is_time = type(seconds) in (int, float) and 0 <= seconds < math.inf
        return State("done", seconds=seconds if is_time else None)
    if not folder.is_dir():
        return State("not launched" if done.issuperset(job.needs) else "waiting")
    step = read_last_record(folder).get("step")
    if is_claimed(folder):
        return State("running", step=step)
    if reason := read_failure(folder):
        return State("failed", reason=reason, step=step)
    if step is not None or any((folder / name).is_file() for name in (RESUME_FILE, JOURNAL_FILE)):
        return State("incomplete", step=step)
    return State("not launched" if done.issuperset(job.needs) else "waiting")
