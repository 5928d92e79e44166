"""Run a plan on this machine: one process a job, forked from a server that imported torch once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from daft_domainbed.errors import UsageError
from daft_domainbed.launch.fork_server import STOP, ForkServer
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.options import Options
from daft_domainbed.launch.schedule import Ended, Observer, Progress, run_graph
from daft_domainbed.launch.states import is_done
from daft_domainbed.launch.work import Outcome
from daft_domainbed.runtime.layout import read_failure
from daft_domainbed.runtime.machine import count_cores


def run_local(root: Path, jobs: Sequence[Job], options: Options, observer: Observer) -> dict[str, str]:
    """Run a plan, so many jobs at a time, and return the failures by folder."""
    return _run(root, jobs, options, observer, [""] * (options.n_jobs or count_cores() // options.threads or 1))


def run_multi_gpu(root: Path, jobs: Sequence[Job], options: Options, observer: Observer) -> dict[str, str]:
    """Run a plan with one job a GPU (or evenly as many more as `n_jobs` says), and return the failures by folder.

    The GPUs are those of CUDA_VISIBLE_DEVICES where that is set, else all of the machine. Jobs that ask for the CPU are
    run as `run_local` does.

    Raises:
        UsageError: There is none that can be used.
    """
    if all(job.args.device == "cpu" for job in jobs):
        return run_local(root, jobs, options, observer)
    devices = list_gpus()
    if not devices:
        raise UsageError(
            "--command_launcher multi_gpu: no GPU can be used here; add --device cpu if the CPU is meant, or use local"
        )
    n_jobs = options.n_jobs or len(devices)
    return _run(root, jobs, options, observer, [devices[i % len(devices)] for i in range(n_jobs)])


def list_gpus() -> list[str]:
    """Return the GPUs that can be used, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()][:count]
    return [str(i) for i in range(count)]


def _run(root: Path, jobs: Sequence[Job], options: Options, observer: Observer, slots: Sequence[str]) -> dict[str, str]:
    if all(is_done(root / job.folder) for job in jobs):
        return {}
    # Read by the libraries as torch is imported.
    server = ForkServer({"OMP_NUM_THREADS": str(options.threads)})
    try:
        return run_graph(root, jobs, _Processes(root, server, options.threads, slots), observer)
    finally:
        server.close()


@dataclass(frozen=True)
class _Running:
    job: Job
    slot: str


class _Processes:
    """A pool of processes; a slot is the GPU that a job sees, or nothing."""

    def __init__(self, root: Path, server: ForkServer, threads: int, slots: Sequence[str]) -> None:
        self.root, self.server, self.threads, self.slots = root, server, threads, slots
        self.running: dict[Connection, _Running] = {}

    def has_room(self) -> bool:
        return len(self.running) < len(self.slots)

    def start(self, job: Job) -> None:
        taken = Counter(entry.slot for entry in self.running.values())
        slot = next(iter((Counter(self.slots) - taken).elements()))
        connection = self.server.fork()
        self.running[connection] = _Running(job, slot)
        with suppress(OSError):
            connection.send((self.root, job, self.threads, {"CUDA_VISIBLE_DEVICES": slot} if slot else {}))

    def wait(self, seconds: float) -> Iterator[Progress | Ended]:
        for connection in wait(list(self.running), seconds):
            assert isinstance(connection, Connection)
            job = self.running[connection].job
            try:
                message = connection.recv()
            except (EOFError, OSError):  # its end, or a message that a kill cut short
                message = self._explain_silence(job)
            if isinstance(message, Outcome):
                del self.running[connection]
                connection.close()
                yield Ended(job, message)
            else:
                yield Progress(job, *message)

    def _explain_silence(self, job: Job) -> Outcome:
        if is_done(self.root / job.folder):
            return Outcome("done")
        reason = read_failure(self.root / job.folder)
        return Outcome("failed", reason or "its process was ended from outside; the same command goes on where it was")

    def stop(self) -> None:
        for connection in self.running:
            with suppress(OSError):
                connection.send(STOP)

    def kill(self) -> None:
        for connection in self.running:
            connection.close()
        self.running.clear()
