"""Work through a sweep's graph of jobs, teachers before those that need them, side by side with other launches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from daft_domainbed.launch.job import Job
from daft_domainbed.launch.states import forget_failures, is_done, write_failure
from daft_domainbed.launch.work import Outcome
from daft_domainbed.runtime import stopping
from daft_domainbed.runtime.layout import read_failure
from daft_domainbed.runtime.locks import is_claimed

SECONDS_BETWEEN_LOOKS = 1.0


class Observer(Protocol):
    """Shows how the jobs are getting on."""

    def plan(self, jobs: Sequence[Job]) -> None:
        """Take note of the jobs that are not done as the launch begins."""

    def start(self, job: Job) -> None:
        """Take note that a job was started."""

    def advance(self, job: Job, step: int, n_steps: int) -> None:
        """Take note that a job has done so many steps."""

    def end(self, job: Job, failure: str | None, seconds: float) -> None:
        """Take note that a job has ended, well or with a reason."""


@dataclass(frozen=True)
class Progress:
    """The news that a job has done so many steps."""

    job: Job
    step: int
    n_steps: int


@dataclass(frozen=True)
class Ended:
    """The news that a job is no longer running here."""

    job: Job
    outcome: Outcome


class Pool(Protocol):
    """A place where jobs run."""

    def has_room(self) -> bool:
        """Return whether another job can be started now."""

    def start(self, job: Job) -> None:
        """Start a job; `wait` yields what becomes of it."""

    def wait(self, seconds: float) -> Iterator[Progress | Ended]:
        """Yield what has happened, waiting for at most so long until something does."""

    def stop(self) -> None:
        """Have the running jobs save where they are and end."""

    def kill(self) -> None:
        """End the running jobs at once."""


def run_graph(root: Path, jobs: Sequence[Job], pool: Pool, observer: Observer) -> dict[str, str]:
    """Run what is not done of a plan, and return the failures by folder.

    A job whose teacher failed is marked as failed; the rest goes on. Jobs that another process has claimed are left to
    it; should it die, they are taken over.

    Args:
        root: The sweep's folder.
        jobs: The plan, teachers before students.
        pool: Where the jobs run.
        observer: Called for everything that happens.

    Raises:
        Stopped: That was asked through `stopping`; what was running has saved where it is.
    """
    graph = _Graph(root, jobs, pool, observer)
    try:
        graph.run()
    finally:
        pool.kill()
    return graph.failures


class _Graph:
    def __init__(self, root: Path, jobs: Sequence[Job], pool: Pool, observer: Observer) -> None:
        self.root, self.pool, self.observer = root, pool, observer
        self.done = {job.folder for job in jobs if is_done(root / job.folder)}
        self.waiting = {job.folder: job for job in jobs if job.folder not in self.done}
        forget_failures(root, self.waiting.values())
        observer.plan(list(self.waiting.values()))
        self.running: dict[str, float] = {}  # since when
        self.elsewhere: dict[str, float] = {}  # jobs of `waiting` that others have claimed: when to look again
        self.failures: dict[str, str] = {}
        self.is_stopping = False

    def run(self) -> None:
        while self.waiting or self.running:
            if stopping.is_requested() and not self.is_stopping:
                self.is_stopping = True
                self.pool.stop()
            if self.is_stopping and not self.running:
                raise stopping.Stopped("the jobs that were running have saved where they are; the same command goes on")
            if not self.is_stopping:
                self._start_ready()
            for event in self.pool.wait(SECONDS_BETWEEN_LOOKS / 2):
                self._take(event)

    def _start_ready(self) -> None:
        for job in list(self.waiting.values()):
            failed = next((need for need in job.needs if need in self.failures), None)
            is_ready = self.pool.has_room() and self.done.issuperset(job.needs)
            if not (failed or is_ready) or not self._is_free(job):
                continue
            if failed:
                reason = f"its teacher {failed} failed"
                write_failure(self.root / job.folder, reason)
                self._finish(job, reason)
            else:
                del self.waiting[job.folder]
                self.running[job.folder] = time.monotonic()
                self.pool.start(job)
                self.observer.start(job)

    def _is_free(self, job: Job) -> bool:
        """Return whether a job is left to start; one that others were at is looked at again from time to time."""
        folder = self.root / job.folder
        if time.monotonic() < self.elsewhere.get(job.folder, 0.0):
            return False
        if is_done(folder):
            self._finish(job, None)
        elif is_claimed(folder):
            self.elsewhere[job.folder] = time.monotonic() + SECONDS_BETWEEN_LOOKS
        elif (reason := read_failure(folder)) and not reason.startswith("its teacher "):  # which is done here
            self._finish(job, reason)
        else:
            return True
        return False

    def _take(self, event: Progress | Ended) -> None:
        if isinstance(event, Progress):
            self.observer.advance(event.job, event.step, event.n_steps)
            return
        job, outcome = event.job, event.outcome
        if outcome.kind in ("busy", "stopped"):
            del self.running[job.folder]
            self.waiting[job.folder] = job
            self.elsewhere[job.folder] = time.monotonic() + SECONDS_BETWEEN_LOOKS
        else:
            self._finish(job, outcome.reason if outcome.kind == "failed" else None)

    def _finish(self, job: Job, failure: str | None) -> None:
        self.waiting.pop(job.folder, None)
        began = self.running.pop(job.folder, None)
        if failure is None:
            self.done.add(job.folder)
        else:
            self.failures[job.folder] = failure
        self.observer.end(job, failure, 0.0 if began is None else time.monotonic() - began)
