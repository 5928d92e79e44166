"""Run sweeps side by side, those that are named first before the others, round by round, and measure each run.

    python -m tools.run_related SWEEP.yaml... [--device cuda] [--n_jobs 15] [--seconds 380]

A round holds out one domain in every trial, another one in each, so that whatever was reached when time is up, every
trial has as many domains. What is done stays; the same command goes on. It is for a machine that is lent for minutes:
processes are started once, not for each job; `daft-domainbed sweep launch` does the same without haste.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from daft_domainbed.hparams import parse_json
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.plan_file import write_plan
from daft_domainbed.launch.states import is_done
from daft_domainbed.launch.sweep import collect_sweep_args
from daft_domainbed.launch.work import do_job
from daft_domainbed.methods import STUDENT
from daft_domainbed.scripts.sweep import read_config
from tools.measure_related import PROBES, measure

N_ENVIRONMENTS = 4


@dataclass(frozen=True)
class Task:
    """A job with its place in the order, and what has to be there before.

    Attributes:
        sweep: Name of its sweep: the file's path below sweeps/related without the suffix.
        root: The sweep's folder.
        job: Of its plan.
        order: Those with less come first.
        needs: Folders of runs that have to be done.
    """

    sweep: str
    root: Path
    job: Job
    order: tuple[int, ...]
    needs: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return (self.root / self.job.folder).resolve()


def plan(groups: Sequence[Sequence[Path]], device: str) -> list[Task]:
    """Write the plans of sweeps, and return all their jobs in order, each once.

    Args:
        groups: Files of sweeps; those of a group are run together, before those of the next.
        device: What all compute on.
    """
    tasks: dict[Path, Task] = {}
    for group, files in enumerate(groups):
        for place, file in enumerate(files):
            given = read_config(file, "launch")
            sweep = collect_sweep_args(given | {"device": device})
            jobs = make_plan(sweep)
            write_plan(sweep, jobs)
            root = Path(sweep.output_dir)
            named = [Path(value) for value in parse_json(sweep.hparams).values() if str(value).startswith("runs/")]
            for job in jobs:
                args = job.args
                key = (args.trial_seed, args.test_envs[0])
                needs = [(root / need).resolve() for need in job.needs]
                if job.stage == STUDENT:
                    for store in [*named, *([PROBES] if file.parent.name == "tintem" else [])]:
                        needs += _find_named(store.resolve(), key, tasks)
                turn = (args.test_envs[0] - args.trial_seed) % N_ENVIRONMENTS
                order = (group, turn, args.trial_seed, place)
                name = f"{file.parent.name}/{file.stem}"
                task = Task(name, root, job, order, tuple(needs))
                tasks.setdefault(task.folder, task)
    return sorted(tasks.values(), key=lambda task: task.order)


def _find_named(where: Path, key: tuple[int, int], tasks: Mapping[Path, Task]) -> Iterator[Path]:
    """Yield the runs of another sweep, or of its store of teachers, that a run may take its teacher from."""
    for folder, task in tasks.items():
        if folder.parent == where and (task.job.args.trial_seed, task.job.args.test_envs[0]) == key:
            yield folder


# --- processes ---------------------------------------------------------------------------------------------------


def work(connection: Connection) -> None:
    """Do and measure what is sent until nothing is; answer each with what went wrong, or nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log = sys.stderr
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the run's own files have it all
    while (task := connection.recv()) is not None:
        started = time.monotonic()
        outcome = do_job(task.root, task.job, threads=1)
        trained = time.monotonic()
        trouble = outcome.reason
        if outcome.kind == "done" and (task.job.stage == STUDENT or task.sweep.startswith("carot")):
            try:
                measure(task.folder, task.sweep, task.job.args.device)
            except Exception as error:  # the run is worth keeping, and can be measured again
                trouble = f"not measured: {type(error).__name__}: {error}"
        seconds = f"{trained - started:.1f} + {time.monotonic() - trained:.1f} s"
        args = task.job.args
        what = f"{task.sweep} {args.algorithm} trial {args.trial_seed} env {args.test_envs[0]}"
        print(f"{what}: {seconds} {trouble}", file=log, flush=True)
        connection.send(outcome.kind)


def run(tasks: Sequence[Task], n_jobs: int, seconds: float) -> int:
    """Run tasks in so many processes until all are done or time is up; return how many are left."""
    context = multiprocessing.get_context("fork")  # with torch and the package imported, and no GPU touched
    until = time.monotonic() + seconds
    workers: dict[Connection, BaseProcess] = {}
    for _ in range(n_jobs):
        near, far = context.Pipe()
        workers[near] = context.Process(target=work, args=(far,), daemon=True)
        workers[near].start()
        far.close()
    done, failed = {task.folder for task in tasks if is_done(task.folder)}, set[Path]()
    waiting = [task for task in tasks if task.folder not in done]
    idle, at_work = list(workers), dict[Connection, Task]()
    while (waiting or at_work) and time.monotonic() < until:
        for task in list(waiting):
            if not idle:
                break
            if failed.intersection(task.needs):
                waiting.remove(task)
                failed.add(task.folder)
            elif done.issuperset(task.needs):
                waiting.remove(task)
                connection = idle.pop()
                at_work[connection] = task
                connection.send(task)
        if not at_work:
            break
        for connection in set(at_work).intersection(wait(list(at_work), timeout=1.0)):
            task = at_work.pop(connection)
            try:
                kind = connection.recv()
                idle.append(connection)
            except EOFError:  # the process was ended from outside
                kind = "failed"
            (done if kind == "done" else failed).add(task.folder)
    for process in workers.values():
        process.kill()
        process.join()
    return len(waiting) + len(at_work)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweeps that are named; a comma stands between files of a group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", metavar="SWEEP.yaml", help="files, a comma between those of a group")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n_jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args(argv)
    started = time.monotonic()
    groups = [[Path(name) for name in group.split(",")] for group in args.groups]
    tasks = plan(groups, args.device)
    print(f"{len(tasks)} jobs planned in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    left = run(tasks, args.n_jobs, args.seconds - (time.monotonic() - started))
    print(f"{left} jobs left", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
