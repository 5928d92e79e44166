"""How a sweep is getting on: live bars on a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from daft_domainbed.launch.job import Job, name_job
from daft_domainbed.launch.kinds import estimate_seconds, name_cause, name_kind
from daft_domainbed.methods import STUDENT
from daft_domainbed.runtime.durations import format_duration


class SweepProgress:
    """Shows stage, job, rate and time left; use as a context manager.

    Args:
        jobs: The whole plan.
        n_jobs: How many run at a time.
        environments: Names of the environments by data set.
        console: Where to show it; standard error by default.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        n_jobs: int,
        environments: Mapping[str, Sequence[str]],
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(stderr=True)
        self.environments, self.n_jobs = environments, n_jobs
        self.total = len(jobs)
        self.finished = 0
        self.left: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.failures: Counter[str] = Counter()
        self.has_draws = any(job.args.hparams_seed for job in jobs)
        self.began: dict[str, tuple[float, int | None]] = {}
        self.tasks: dict[str, Any] = {}
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.overall = self.bars.add_task("all jobs", total=self.total, note="")

    def __enter__(self) -> SweepProgress:
        self.bars.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self.bars.disable:  # rich before 14.3 ends disabled bars with an empty line
            self.bars.stop()
        for cause, count in self.failures.items():
            if count > 1:
                self.console.print(Text(f"{count} jobs FAILED, all of them: {cause}"), soft_wrap=True)

    def plan(self, jobs: Sequence[Job]) -> None:
        """Take note of the jobs that are still to be run; the others are done. What was planned before is forgotten."""
        self.finished = self.total - len(jobs)
        self.bars.update(self.overall, completed=self.finished)
        self.left = Counter(name_kind(job) for job in jobs)

    def start(self, job: Job) -> None:
        """Show a job that was started."""
        self.tasks[job.folder] = self.bars.add_task(f"  {self.describe(job)}", total=None, note="starting")
        self.began[job.folder] = (time.monotonic(), None)

    def advance(self, job: Job, step: int, n_steps: int) -> None:
        """Show how far a job is, and how fast."""
        began, first = self.began[job.folder]
        if first is None:
            self.began[job.folder] = (time.monotonic(), step)
            rate = ""
        else:
            elapsed = time.monotonic() - began
            rate = f"{(step - first) / elapsed:.1f} steps/s" if elapsed > 0 else ""
        self.bars.update(self.tasks[job.folder], completed=step, total=n_steps, note=rate)

    def end(self, job: Job, failure: str | None, seconds: float) -> None:
        """Say how a job ended, and how long the rest may take."""
        self.finished += 1
        kind = name_kind(job)
        self.left[kind] -= 1
        if failure is None:
            self.seconds[kind].append(seconds)
        if job.folder in self.tasks:
            self.bars.remove_task(self.tasks.pop(job.folder))
        note = self.estimate_time_left()
        self.bars.update(self.overall, completed=self.finished, note=note)
        if failure is not None:
            cause = name_cause(failure)
            self.failures[cause] += 1
            if self.failures[cause] > 1:  # said once, and counted in the end
                return
        outcome = f"done in {format_duration(seconds)}" if failure is None else f"FAILED: {failure}"
        line = f"[{self.finished}/{self.total}] {self.describe(job)}: {outcome}" + (f"; {note}" if note else "")
        self.console.print(Text(line), soft_wrap=True)

    def estimate_time_left(self) -> str:
        """Return how long the rest may take, with so many jobs at a time; nothing while that is unknown."""
        work = estimate_seconds(self.left, self.seconds)
        return f"about {format_duration(work / self.n_jobs)} left" if work else ""

    def describe(self, job: Job) -> str:
        """Return a job's name: stage, held-out environments, trial, draw."""
        names = self.environments[job.args.dataset]
        held_out = " and ".join(names[i] for i in job.args.test_envs)
        what = f"{job.args.algorithm} student" if job.stage == STUDENT else name_job(job)
        number = job.args.hparams_seed
        draw = f", draw {number}" if number else ", defaults" if self.has_draws and job.stage == STUDENT else ""
        return f"{what}, {held_out} held out, trial {job.args.trial_seed}{draw}"
