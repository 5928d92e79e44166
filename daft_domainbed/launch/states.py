"""How the jobs of a sweep stand, read from their folders alone: whoever launched them, wherever they run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from daft_domainbed.launch.plan import Job
from daft_domainbed.locks import is_claimed
from daft_domainbed.run_folder import DONE_FILE, RECORDS_FILE, RESUME_FILE

FAILED_FILE = "failed"

Kind = Literal["done", "running", "incomplete", "failed", "waiting", "not launched"]
KINDS: tuple[Kind, ...] = ("done", "running", "incomplete", "failed", "waiting", "not launched")


@dataclass(frozen=True)
class State:
    """How a job stands.

    Attributes:
        kind: "waiting" for a teacher that is not done; "incomplete" goes on where it was at the next launch.
        reason: Of a failure, its first line.
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


def read_failure(folder: Path) -> str:
    """Return why a job failed, in one line, or nothing where it did not."""
    with suppress(OSError):
        lines = (folder / FAILED_FILE).read_text(errors="replace").splitlines()
        return lines[0] if lines else "no reason given"  # a full disk leaves an empty file
    return ""


def forget_failures(root: Path, jobs: Iterable[Job]) -> None:
    """Have jobs that failed tried again, but for those that another process is at."""
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
        seconds: Any = _read_last(folder).get("seconds")
        is_time = type(seconds) in (int, float) and 0 <= seconds < math.inf
        return State("done", seconds=seconds if is_time else None)
    if not folder.is_dir():
        return State("not launched" if done.issuperset(job.needs) else "waiting")
    step = _read_last(folder).get("step")
    if is_claimed(folder):
        return State("running", step=step)
    if reason := read_failure(folder):
        return State("failed", reason=reason, step=step)
    if (folder / RESUME_FILE).is_file() or step is not None:
        return State("incomplete", step=step)
    return State("not launched" if done.issuperset(job.needs) else "waiting")


def _read_last(folder: Path) -> dict[str, Any]:
    """Return the numbers of a run's last whole record, without reading those before it."""
    try:
        with (folder / RECORDS_FILE).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**17))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines):
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                return record
    return {}
