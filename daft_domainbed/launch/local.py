"""Run a plan on this machine: one process a job, a few at a time, forked from a server that imported torch once."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.engine import train
from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.launch.plan import Job

FAILED_FILE = "failed"
_PRELOADED = ["daft_domainbed.engine", "daft_domainbed.algorithms", "daft_domainbed.embedded.datasets"]
_SECONDS_BETWEEN_REPORTS = 0.25


class Observer(Protocol):
    """Whoever shows how the jobs are getting on."""

    def start(self, job: Job) -> None:
        """A job's process was started."""

    def advance(self, job: Job, step: int, n_steps: int) -> None:
        """A job has done so many steps."""

    def end(self, job: Job, failure: str | None, seconds: float) -> None:
        """A job has ended, well or with a reason."""


@dataclass
class _Running:
    job: Job
    process: Any
    connection: Connection
    began: float


def run_jobs(root: Path, jobs: Sequence[Job], *, n_jobs: int, threads: int, observer: Observer) -> dict[str, str]:
    """Run what is not done of a plan, teachers before those that need them, and return the failures by folder.

    A job whose teacher failed is not run but marked as failed; the rest goes on. Jobs that were interrupted go on
    where they were. When this process dies, its jobs end with it.

    Args:
        root: The sweep's folder.
        jobs: The plan, teachers before students.
        n_jobs: How many run at a time.
        threads: Of each job; fixed, so that numbers do not depend on how many run at a time.
        observer: Told of everything that happens.
    """
    # Read by the server at its start, before it imports torch.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    done = {job.folder for job in jobs if is_done(root / job.folder)}
    waiting = [job for job in jobs if job.folder not in done]
    for job in waiting:
        (root / job.folder / FAILED_FILE).unlink(missing_ok=True)
    failures: dict[str, str] = {}
    running: list[_Running] = []
    try:
        while waiting or running:
            for job in list(waiting):
                if failed := next((folder for folder in job.needs if folder in failures), None):
                    waiting.remove(job)
                    failures[job.folder] = f"its teacher {failed} failed"
                    _leave_failure(root / job.folder, failures[job.folder])
                    observer.end(job, failures[job.folder], 0.0)
                elif len(running) < n_jobs and done.issuperset(job.needs):
                    waiting.remove(job)
                    running.append(_start(context, root, job, threads))
                    observer.start(job)
            if not running:
                continue
            ready = wait([entry.connection for entry in running])
            for entry in [entry for entry in running if entry.connection in ready]:
                if not _hear(entry, root, observer, done, failures):
                    running.remove(entry)
    finally:
        for entry in running:  # only where this process is interrupted
            entry.process.terminate()
            entry.process.join()
    return failures


def is_done(folder: Path) -> bool:
    """Return whether a run is complete."""
    return (folder / "done").is_file()


def _start(context: Any, root: Path, job: Job, threads: int) -> _Running:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, root / job.folder, job.args, threads))
    process.start()
    theirs.close()
    return _Running(job, process, ours, time.monotonic())


def _hear(entry: _Running, root: Path, observer: Observer, done: set[str], failures: dict[str, str]) -> bool:
    """Take a job's next message; return whether it is still running."""
    try:
        step, n_steps = entry.connection.recv()
    except (EOFError, OSError):  # its end, or a message that a kill cut short
        entry.process.join()
        failure = None if is_done(root / entry.job.folder) else _read_failure(root / entry.job.folder, entry.process)
        if failure is None:
            done.add(entry.job.folder)
        else:
            failures[entry.job.folder] = failure
        observer.end(entry.job, failure, time.monotonic() - entry.began)
        return False
    observer.advance(entry.job, step, n_steps)
    return True


def _read_failure(folder: Path, process: Any) -> str:
    with suppress(OSError, IndexError):  # a full disk leaves an empty file
        return (folder / FAILED_FILE).read_text().splitlines()[0]
    return f"its process ended with status {process.exitcode}; the same command goes on where it was"


def _work(connection: Connection, folder: Path, args: TrainArgs, threads: int) -> None:
    """Train in a process of its own; what goes wrong is left in the job's folder."""
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the run's own files have it all
    last = 0.0

    def report(step: int, n_steps: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_REPORTS or step == n_steps:
            last = time.monotonic()
            with suppress(OSError):  # the launcher is gone: an interruption, not a failure
                connection.send((step, n_steps))

    try:
        train(replace(args, output_dir=str(folder)), quiet=True, wait=True, on_step=report)
    except KeyboardInterrupt:
        os._exit(130)
    except (UsageError, RunError, OSError) as error:
        _leave_failure(folder, " ".join(str(error).split()))
        os._exit(1)
    except Exception as error:
        with suppress(OSError), (folder / "err.txt").open("a") as file:
            traceback.print_exc(file=file)
        _leave_failure(folder, f"{type(error).__name__}: {' '.join(str(error).split())} (traceback in its err.txt)")
        os._exit(1)


def _leave_failure(folder: Path, line: str) -> None:
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILED_FILE).write_text(line + "\n")


def _end_with_parent(connection: Connection) -> None:
    """End this process when the launcher's end of the pipe closes, however the launcher died."""
    with suppress(EOFError, OSError):
        connection.recv()
    os._exit(1)
