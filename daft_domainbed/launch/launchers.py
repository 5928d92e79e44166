"""The launchers by name: built-in ones, those of installed packages, and those of the user's DomainBed."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.host import contract
from daft_domainbed.launch.job import Job, group_by_depth, name_job
from daft_domainbed.launch.options import Options
from daft_domainbed.launch.schedule import Observer
from daft_domainbed.launch.states import forget_failures, is_done, read_states
from daft_domainbed.plugin import upstream
from daft_domainbed.runtime import stopping

ENTRY_POINTS = "daft_domainbed.launchers"

# Runs what is not done of a plan, teachers first. Returns the failures by folder, or None where the jobs were handed
# over to a queue and nobody has to stay.
Launcher = Callable[[Path, Sequence[Job], Options, Observer], dict[str, str] | None]


def find_launcher(name: str, host: str) -> Launcher:
    """Return a launcher by name.

    Args:
        name: A built-in one, an entry point of the group `daft_domainbed.launchers`, or a name of DomainBed's REGISTRY.
        host: DomainBed's are known where it is "upstream".

    Raises:
        UsageError: There is none of that name; says the nearest.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    installed = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in installed:
        return _take_commands(installed[name].load())
    hosts = upstream.get_launchers(contract.find_host(host))
    if name in hosts:
        return _take_commands(hosts[name])
    names = [*_BUILT_IN, *installed, *hosts]
    raise UsageError(f"no launcher {name!r}.{suggest(name, names)} There are {', '.join(dict.fromkeys(names))}")


def make_command(root: Path, job: Job, threads: int) -> str:
    """Return the shell command that does one job, from where it was, in a process of its own."""
    program = [sys.executable, "-m", "daft_domainbed.launch.work"]
    return shlex.join([*program, str(root.resolve()), job.folder, "--threads", str(threads)])


def _take_commands(launch: Callable[[list[str]], Any]) -> Launcher:
    """Make a launcher of a function in DomainBed's manner, which takes a list of commands: those of a stage at a time.

    It may return before they have ended. A student then finds its teacher in the making, and waits for it.
    """

    def run(root: Path, jobs: Sequence[Job], options: Options, observer: Observer) -> dict[str, str] | None:
        forget_failures(root, [job for job in jobs if not is_done(root / job.folder)])
        for stage in group_by_depth(jobs):
            open_jobs = [job for job in stage if not is_done(root / job.folder)]
            if open_jobs:
                with stopping.raising():
                    launch([make_command(root, job, options.threads) for job in open_jobs])
        states = read_states(root, jobs)
        if all(state.kind in ("done", "failed") for state in states.values()):
            return {folder: state.reason for folder, state in states.items() if state.kind == "failed"}
        return None

    return run


def _print_commands(root: Path, jobs: Sequence[Job], options: Options, observer: Observer) -> None:
    """Print the command of each job that is not done, stage by stage; nothing is run, and nothing written."""
    for stage in group_by_depth(jobs):
        open_jobs = [job for job in stage if not is_done(root / job.folder)]
        for kind, count in Counter(map(name_job, open_jobs)).items():
            print(f"# {kind}: {count}")
        for job in open_jobs:
            print(make_command(root, job, options.threads))


def _get_local() -> Launcher:
    from daft_domainbed.launch.local import run_local

    return run_local


def _get_multi_gpu() -> Launcher:
    from daft_domainbed.launch.local import run_multi_gpu

    return run_multi_gpu


def _get_slurm() -> Launcher:
    from daft_domainbed.launch.slurm import submit_slurm

    return submit_slurm


def _get_ray() -> Launcher:
    from daft_domainbed.launch.ray import run_ray

    return run_ray


_BUILT_IN: dict[str, Callable[[], Launcher]] = {
    "local": _get_local,
    "multi_gpu": _get_multi_gpu,
    "slurm": _get_slurm,
    "ray": _get_ray,
    "dummy": lambda: _print_commands,
}
