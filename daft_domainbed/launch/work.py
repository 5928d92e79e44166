"""Do one job of a sweep in this process: what every launcher has done, on whatever machine.

Run as a program, with a sweep's folder and a job's name in its plan, it does that job: the command that DomainBed's
launchers, and the user's own, are given.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from daft_domainbed import plugin
from daft_domainbed.adaptation.adapt import AdaptArgs, adapt
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.cli import positive_int
from daft_domainbed.errors import DISK_FULL, RunError, UsageError
from daft_domainbed.evaluation.evaluate import EvaluateArgs, evaluate
from daft_domainbed.launch.evaluations import read_evaluations
from daft_domainbed.launch.job import EvaluationJob, Job
from daft_domainbed.launch.plan_file import read_jobs
from daft_domainbed.launch.states import is_done, write_failure
from daft_domainbed.methods import ADAPTATION
from daft_domainbed.runtime import stopping
from daft_domainbed.runtime.layout import FAILED_FILE, read_failure
from daft_domainbed.runtime.locks import Claimed, TakenOver
from daft_domainbed.training.engine import train


@dataclass(frozen=True)
class Outcome:
    """How a job ended: done, failed for a reason, left to another process that is at it, or stopped to go on later."""

    kind: Literal["done", "failed", "busy", "stopped"]
    reason: str = ""


def do_job(root: Path, job: Job, *, threads: int, on_step: Callable[[int, int], None] | None = None) -> Outcome:
    """Train, evaluate or adapt what a job says, from where it was; what goes wrong is left in its folder.

    A job whose teacher failed is not run. A teacher that is merely missing is trained on the way, or waited for.

    Args:
        root: The sweep's folder.
        job: Of its plan.
        threads: Fixed, so that numbers do not depend on how many jobs run at a time.
        on_step: Told after each step how many are done, and of how many.
    """
    import torch

    root = Path(os.path.abspath(root))
    folder = root / job.folder
    if is_done(folder):
        return Outcome("done")
    for need in job.needs:
        if not is_done(root / need) and read_failure(root / need):
            return _fail(folder, f"its teacher {need} failed")
    torch.set_num_threads(threads)
    try:
        (folder / FAILED_FILE).unlink(missing_ok=True)
        for source in job.imports:
            plugin.import_source(source)
        with _working_in(job.cwd):
            _do(root, job, on_step)
    except (Claimed, TakenOver):
        return Outcome("busy")
    except stopping.Stopped as stopped:
        return Outcome("stopped", str(stopped))
    except (UsageError, RunError, OSError) as error:
        is_full = isinstance(error, OSError) and error.errno in DISK_FULL
        return _fail(folder, "the disk is full: free some space and launch again" if is_full else str(error))
    except Exception as error:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "err.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
                traceback.print_exc(file=file)
        return _fail(folder, f"{type(error).__name__}: {error} (traceback in its err.txt)")
    return Outcome("done")


@contextmanager
def _working_in(folder: str) -> Iterator[None]:
    before = os.getcwd()
    if os.path.isdir(folder):
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _do(root: Path, job: Job, on_step: Callable[[int, int], None] | None) -> None:
    if job.stage == ADAPTATION and isinstance(job, EvaluationJob):
        adapt(AdaptArgs(str(root / job.checkpoint), output_dir=str(root / job.folder), **job.asked), on_step=on_step)
    elif isinstance(job, EvaluationJob):
        evaluate(
            EvaluateArgs([str(root / job.checkpoint)], output_dir=str(root / job.folder), **job.asked), on_step=on_step
        )
    else:
        train(_place(root, job), quiet=True, on_step=on_step)


def _place(root: Path, job: Job) -> TrainArgs:
    """Return a job's arguments with the places where the sweep lies now."""
    args = replace(job.args, output_dir=str(root / job.folder))
    return replace(args, teachers_dir=str((root / job.needs[0]).parent)) if job.needs else args


def _fail(folder: Path, reason: str) -> Outcome:
    reason = " ".join(reason.split())
    write_failure(folder, reason)
    return Outcome("failed", reason)


def main(argv: Sequence[str] | None = None) -> int:
    """Do one job of a sweep that has a plan."""
    parser = argparse.ArgumentParser(prog="python -m daft_domainbed.launch.work", description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("job", help="its folder in the plan")
    parser.add_argument("--threads", type=positive_int, default=1)
    args = parser.parse_args(argv)
    try:
        job = _find_job(args.sweep, args.job)
    except UsageError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    with stopping.listening(signal.SIGINT, signal.SIGTERM):
        outcome = do_job(args.sweep, job, threads=args.threads)
    if outcome.reason:
        print(outcome.reason, file=sys.stderr)
    return {"done": 0, "busy": 0, "failed": RunError.exit_status, "stopped": 128 + signal.SIGTERM}[outcome.kind]


def _find_job(root: Path, folder: str) -> Job:
    jobs = {job.folder: job for job in [*read_jobs(root), *read_evaluations(root)]}
    if folder not in jobs:
        raise UsageError(f"the plan of {root} has no job {folder}: the launcher 'dummy' prints each job's command")
    return jobs[folder]


if __name__ == "__main__":
    sys.exit(main())
