"""Run a plan on Ray: a task a job, on a running cluster or on this machine; a lost node's jobs go on elsewhere."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from daft_domainbed.errors import UsageError
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.options import Options
from daft_domainbed.launch.schedule import Ended, Observer, Progress, run_graph
from daft_domainbed.launch.states import is_done
from daft_domainbed.launch.work import Outcome, do_job
from daft_domainbed.runtime import stopping

_RETRIES = 3  # of a job whose worker or node was lost; each goes on where the last one was
SECONDS_BETWEEN_REPORTS = 1.0
_FOLDER = "daft_ray_"


def run_ray(root: Path, jobs: Sequence[Job], options: Options, observer: Observer) -> dict[str, str]:
    """Run a plan as Ray tasks and return the failures by folder.

    The sweep's folder has to be at the same path on every node, and this package installed there.

    Raises:
        UsageError: Ray is not installed, or nothing answers at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("--command_launcher ray needs Ray: pip install 'daft-domainbed[ray]'") from error
    if all(is_done(root / job.folder) for job in jobs):
        return {}
    folder = None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if options.ray_address is None:
        _remove_abandoned()
        folder = tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}_")
        n_cpus = options.n_jobs * options.threads if options.n_jobs else None
        ray.init(num_cpus=n_cpus, include_dashboard=False, _temp_dir=folder, **quiet)
    else:
        _check_address(options.ray_address)
        ray.init(address=options.ray_address, **quiet)
    try:
        if stopping.is_requested():
            raise stopping.Stopped("stopped before any job was started; the same command starts them")
        # Ray has put a signal handler of its own in the place of the launcher's.
        with stopping.listening(signal.SIGINT, signal.SIGTERM):
            return run_graph(root, jobs, _Tasks(ray, root, options, jobs[0].args.device), observer)
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _check_address(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself would try it for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=10):
            pass
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--ray_address {address}: no Ray cluster answers there ({error}); give HOST:PORT of 'ray start --head'"
        ) from error


def _remove_abandoned() -> None:
    """Remove what Ray left of launches that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*_*"):
        owner = folder.name.removeprefix(_FOLDER).partition("_")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(folder, ignore_errors=True)


class _Board:
    """An actor to which tasks report how far they are, and which tells them whether to stop."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[int, int]] = {}
        self.is_stopping = False

    def report(self, folder: str, step: int, n_steps: int) -> bool:
        self.steps[folder] = (step, n_steps)
        return self.is_stopping

    def take(self) -> dict[str, tuple[int, int]]:
        steps, self.steps = self.steps, {}
        return steps

    def stop(self) -> None:
        self.is_stopping = True


def _do_job(root: Path, place: str, job: Job, threads: int, board: Any) -> Outcome:
    import ray

    with suppress(OSError):
        os.chdir(place)  # relative paths in the plan are the launcher's
    last = 0.0

    def report(step: int, n_steps: int) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_REPORTS:
            last = time.monotonic()
            with suppress(ray.exceptions.RayError):  # the launcher's node is lost; the job is none the worse
                if ray.get(board.report.remote(job.folder, step, n_steps)):
                    stopping.request()

    with stopping.listening(signal.SIGTERM):
        return do_job(root, job, threads=threads, on_step=report)


class _Tasks:
    """A pool of Ray tasks."""

    def __init__(self, ray: Any, root: Path, options: Options, device: str) -> None:
        self.ray, self.root, self.options = ray, root, options
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self.board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
        self.running: dict[Any, Job] = {}
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        self.n_gpus = int(device.startswith("cuda") or (device == "auto" and has_gpus))
        self.n_slots = self._count_slots()
        if not self.n_slots:
            raise UsageError(
                f"a job takes {options.threads} CPUs and {self.n_gpus} GPUs, and Ray has fewer: give it less "
                "(--threads, --device), or a larger cluster"
            )

    def _count_slots(self) -> int:
        """Return how many jobs fit: more would only wait in Ray's queue, where nobody can take them over."""
        resources = self.ray.cluster_resources()
        fit = int(resources.get("CPU", 0)) // self.options.threads
        if self.n_gpus:
            fit = min(fit, int(resources.get("GPU", 0)))
        return min(fit, self.options.n_jobs or fit)

    def has_room(self) -> bool:
        return len(self.running) < self.n_slots

    def start(self, job: Job) -> None:
        task = self.ray.remote(num_cpus=self.options.threads, num_gpus=self.n_gpus, max_retries=_RETRIES)(_do_job)
        reference = task.remote(self.root.resolve(), os.getcwd(), job, self.options.threads, self.board)
        self.running[reference] = job

    def wait(self, seconds: float) -> Iterator[Progress | Ended]:
        if not self.running:
            time.sleep(seconds)
            return
        ready, _ = self.ray.wait(list(self.running), timeout=seconds)
        self.n_slots = self._count_slots()  # a cluster grows and shrinks
        jobs = {job.folder: job for job in self.running.values()}
        for folder, (step, n_steps) in self.ray.get(self.board.take.remote()).items():
            if folder in jobs:
                yield Progress(jobs[folder], step, n_steps)
        for reference in ready:
            job = self.running.pop(reference)
            try:
                outcome = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                is_whole = is_done(self.root / job.folder)
                outcome = Outcome("done") if is_whole else Outcome("failed", f"Ray gave it up: {reason}")
            yield Ended(job, outcome)

    def stop(self) -> None:
        self.ray.get(self.board.stop.remote())

    def kill(self) -> None:
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        self.running.clear()
