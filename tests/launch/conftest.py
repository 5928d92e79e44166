"""Sweeps small enough for a test to run several of them in its own process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from daft_domainbed import plugin
from daft_domainbed.arguments import SweepArgs
from daft_domainbed.host import contract
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.options import Options
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.plan_file import write_plan
from daft_domainbed.launch.schedule import Observer
from daft_domainbed.launch.work import do_job
from daft_domainbed.runtime.randomness import preserve_states
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


def run_here(
    root: Path, jobs: Sequence[Job], options: Options | None = None, observer: Observer | None = None
) -> dict[str, str]:
    """A launcher that does all in this process, one job after another."""
    outcomes = {job.folder: do_job(root, job, threads=1) for job in jobs}
    return {folder: outcome.reason for folder, outcome in outcomes.items() if outcome.kind == "failed"}


@contextmanager
def preserving() -> Iterator[None]:
    """Leave random states, threads and host as they were before jobs ran in this process."""
    threads = torch.get_num_threads()
    with preserve_states():
        yield
    torch.set_num_threads(threads)
    plugin.unregister(contract.find_host())


@pytest.fixture
def in_process() -> Iterator[None]:
    """Lets jobs run in this process."""
    with preserving():
        yield
