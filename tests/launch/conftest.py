"""Sweeps small enough for a test to run several of them in its own process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daft_domainbed.arguments import SweepArgs
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.options import Options
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.plan_file import write_plan
from daft_domainbed.launch.schedule import Observer
from daft_domainbed.launch.work import do_job
from tests.conftest import HPARAMS, TEACHER_HPARAMS


def make_sweep(root: Path, *algorithms: str, user: dict[str, Any] | None = None, **flags: Any) -> SweepArgs:
    """Return a sweep of some algorithms, ERM if none is named, over the three domains of Debug28."""
    tiny = HPARAMS | (TEACHER_HPARAMS if set(algorithms) - {"ERM"} else {}) | (user or {})
    values: dict[str, Any] = {
        "datasets": ["Debug28"],
        "algorithms": list(algorithms) or ["ERM"],
        "output_dir": str(root),
        "n_trials": 1,
        "n_hparams": 1,
        "single_test_envs": True,
        "steps": 4,
        "checkpoint_freq": 2,
        "hparams": json.dumps(tiny),
        "device": "cpu",
    }
    return SweepArgs(**values | flags)


def plan(root: Path, *algorithms: str, **flags: Any) -> list[Job]:
    """Write the plan of such a sweep, and return its jobs."""
    sweep = make_sweep(root, *algorithms, **flags)
    jobs = make_plan(sweep)
    write_plan(sweep, jobs)
    return jobs


class Silence:
    """An observer that is told everything and does nothing."""

    def plan(self, jobs: Sequence[Job]) -> None: ...
    def start(self, job: Job) -> None: ...
    def advance(self, job: Job, step: int, n_steps: int) -> None: ...
    def end(self, job: Job, failure: str | None, seconds: float) -> None: ...


def make_hold(folder: Path, algorithm: str, at: int, until: str = "stopping.is_requested()", times: int = 99) -> str:
    """Return code that has an algorithm's runs wait in the update of that number until something is true.

    Each leaves a file `held-<process>` in the folder when it begins to wait; with so many there, no other one waits.
    """
    return f"""
import os, time
from pathlib import Path
from daft_domainbed import plugin
from daft_domainbed.host.contract import find_host
from daft_domainbed.runtime import stopping
plugin.register(find_host())
kind, left = find_host().algorithms.{algorithm}, {at}
update = kind.update
def update_or_wait(self, *args):
    global left
    left -= 1
    if left == 0 and len(list(Path({str(folder)!r}).glob("held-*"))) < {times}:
        Path({str(folder)!r}, f"held-{{os.getpid()}}").touch()
        while not ({until}):
            time.sleep(0.01)
    return update(self, *args)
kind.update = update_or_wait
"""


def run_here(
    root: Path, jobs: Sequence[Job], options: Options | None = None, observer: Observer | None = None
) -> dict[str, str]:
    """A launcher that does all in this process, one job after another."""
    outcomes = {job.folder: do_job(root, job, threads=1) for job in jobs}
    return {folder: outcome.reason for folder, outcome in outcomes.items() if outcome.kind == "failed"}
