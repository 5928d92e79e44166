"""A whole sweep: launched, shown, cleaned."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.methods import ADAPTATION, COMPARED, STUDENT

if TYPE_CHECKING:
    from daft_domainbed.arguments import SweepArgs
    from daft_domainbed.launch.job import Job
    from daft_domainbed.launch.launchers import Launcher
    from daft_domainbed.launch.options import Options

_RERUN_TRIALS = 5


def collect_sweep_args(given: dict[str, Any]) -> SweepArgs:
    """Return a sweep's arguments: those given, else those that its folder was begun with, else the defaults.

    Raises:
        UsageError: No data set is named.
    """
    from daft_domainbed.arguments import PLACES, SweepArgs
    from daft_domainbed.launch.plan_file import read_jobs, read_sweep_args
    from daft_domainbed.runtime.layout import PLAN_FILE, TEACHERS_FOLDER

    names = {field.name for field in fields(SweepArgs)}
    values: dict[str, Any] = {"algorithms": list(COMPARED)}
    root = Path(given["output_dir"])
    if (root / PLAN_FILE).is_file():
        values = {name: value for name, value in read_sweep_args(root).items() if name in names}
        student = next(job.args for job in read_jobs(root) if job.stage == STUDENT)
        values |= {name: getattr(student, name) for name in (*PLACES, "log")}
        if Path(student.teachers_dir or "") == Path(student.output_dir).parent / TEACHERS_FOLDER:
            del values["teachers_dir"]  # the sweep's own, which moves with it
        values["data"] = {
            name: place for name, place in values["data"].items() if name not in given.get("datasets", [])
        }
    values |= {name: value for name, value in given.items() if name in names}
    if not values.get("datasets"):
        raise UsageError("--datasets is needed, as in --datasets EmojiStyles; 'daft-domainbed doctor' lists them")
    return SweepArgs(**values)


def collect_rerun_args(given: dict[str, Any]) -> SweepArgs:
    """Return the arguments of a sweep that trains what another one chose: the other's, else those given.

    Raises:
        UsageError: No search is named, or there is nothing to choose from in it.
    """
    from daft_domainbed.launch.plan import forget_unknown
    from daft_domainbed.launch.plan_file import read_jobs
    from daft_domainbed.launch.rerun import HOW, plan_rerun
    from daft_domainbed.launch.states import is_done

    if "search" not in given:
        raise UsageError("--from is needed: the folder of the search, as in sweep rerun --from runs/search")
    if flags := sorted({"n_trials_from", "n_hparams", "n_hparams_from"} & given.keys()):
        raise UsageError(
            f"--{flags[0]} has no place here: rerun takes one setting, in trials after those of the search"
        )
    own = {name: value for name, value in given.items() if name not in ("n_trials", "output_dir")}
    root = Path(given["search"])
    jobs = read_jobs(root)
    search = collect_sweep_args(own | {"output_dir": str(root)})
    if "hparams" not in given:  # of the search, which may have more algorithms
        search = forget_unknown(search)
    if left := sum(not is_done(root / job.folder) for job in jobs):
        print(f"{root}: {left} of {len(jobs)} jobs are not done; chosen among those that are", file=sys.stderr)
    sweep, settings = plan_rerun(
        search, given.get("n_trials", _RERUN_TRIALS), given.get("choose", HOW[0]), given["output_dir"]
    )
    for setting in settings:
        print(setting.describe(), file=sys.stderr)
    return sweep


def launch(sweep: SweepArgs, options: Options, *, launcher: str, ask: bool, keep: str = "all") -> bool:
    """Plan a sweep and run what is not done of it; return whether that was allowed.

    Raises:
        UsageError: The sweep, or the launcher, cannot be.
        RunError: A job failed; the others were run nevertheless.
        Stopped: By a signal; the jobs that were running have saved where they are.
    """
    from daft_domainbed.arguments import PLACES
    from daft_domainbed.data.place import settle_data
    from daft_domainbed.launch.launchers import find_launcher
    from daft_domainbed.launch.plan import make_plan
    from daft_domainbed.launch.plan_file import (
        check_plan,
        list_planned,
        name_environments,
        read_begun_data,
        read_working_folder,
        write_plan,
    )
    from daft_domainbed.launch.states import is_done
    from daft_domainbed.launch.summary import list_size_warnings

    run, options = find_launcher(launcher, sweep.host), replace(options, threads=sweep.threads)
    is_of_before = check_plan(sweep)
    root = Path(sweep.output_dir)
    # It goes on from any folder.
    places = {name: os.path.abspath(path) for name in PLACES if name != "device" and (path := getattr(sweep, name))}
    sweep = settle_data(replace(sweep, **places), read_begun_data(root))
    jobs = make_plan(sweep, read_working_folder(root), list_planned(root), is_of_before=is_of_before)
    for warning in list_size_warnings(jobs):
        print(warning, file=sys.stderr)
    waiting = [job for job in jobs if not is_done(root / job.folder)]
    if ask and launcher != "dummy":
        _print_summary(root, jobs)
        if waiting and not _confirm(f"Launch {len(waiting)} jobs with {launcher}?"):
            return False
    if launcher != "dummy":
        write_plan(sweep, jobs)
    failures = _run(run, root, jobs, waiting, options, name_environments(sweep))
    if keep == "chosen" and failures is not None:
        _keep_chosen(root)
    if not waiting:
        print(f"all {len(jobs)} jobs are done", file=sys.stderr)
    return True


def ask_chosen(root: Path, stage: str, asked: Mapping[str, Any], options: Options, *, launcher: str, ask: bool) -> None:
    """Evaluate, or adapt, the checkpoints that a sweep chose, as far as that is not done.

    Raises:
        UsageError: Nothing is chosen yet, or the sweep holds evaluations that were asked otherwise.
        RunError: A job failed; the others were run nevertheless.
        Stopped: By a signal; the same command goes on.
    """
    from daft_domainbed.launch.evaluations import plan_adaptations, plan_evaluations, write_evaluations
    from daft_domainbed.launch.launchers import find_launcher
    from daft_domainbed.launch.plan_file import read_environments
    from daft_domainbed.launch.states import is_done

    sweep = collect_sweep_args({"output_dir": str(root)})
    run, options = find_launcher(launcher, sweep.host), replace(options, threads=sweep.threads)
    jobs = (plan_adaptations if stage == ADAPTATION else plan_evaluations)(root, asked)
    waiting = [job for job in jobs if not is_done(root / job.folder)]
    question = f"Launch {len(waiting)} {stage}s of {len(jobs)} with {launcher}?"
    if ask and waiting and launcher != "dummy" and not _confirm(question):
        return
    if launcher != "dummy":
        write_evaluations(root, jobs)
    _run(run, root, jobs, waiting, options, read_environments(root))


def _run(
    run: Launcher,
    root: Path,
    jobs: Sequence[Job],
    waiting: Sequence[Job],
    options: Options,
    environments: Mapping[str, Sequence[str]],
) -> dict[str, str] | None:
    """Run jobs on a launcher and show how they get on; return the failures, as launchers do."""
    from daft_domainbed.launch.kinds import name_cause
    from daft_domainbed.launch.progress import SweepProgress
    from daft_domainbed.runtime import stopping

    with (
        stopping.listening(signal.SIGINT, signal.SIGTERM),
        SweepProgress(jobs, options.n_jobs or 1, environments) as progress,
    ):
        # Some launchers do not look themselves; those that do look again once their processes are up.
        progress.plan(waiting)
        failures = run(root, jobs, options, progress)
    if failures:
        folder, reason = next(iter(failures.items()))
        same = sum(name_cause(other) == name_cause(reason) for other in failures.values())
        count = f" ({same} for this cause)" if same > 1 else ""
        raise RunError(f"{len(failures)} of {len(jobs)} jobs failed, the first in {root / folder}: {reason}{count}")
    return failures


def show_status(root: Path) -> None:
    """Print how a sweep stands: jobs by kind and state, failures, rate, time left, disk.

    Raises:
        UsageError: The folder holds no sweep.
    """
    from daft_domainbed.launch import slurm
    from daft_domainbed.launch.evaluations import read_evaluations
    from daft_domainbed.launch.plan_file import read_jobs
    from daft_domainbed.runtime.layout import QUEUE_FILE

    _print_summary(root, [*read_jobs(root), *read_evaluations(root)])
    if (root / QUEUE_FILE).is_file() and shutil.which("squeue"):
        print(f"in Slurm's queue: {len(slurm.list_queued(root))} jobs, waiting or running")


def delete_incomplete(root: Path, *, ask: bool) -> None:
    """Remove the folders of runs that were begun and are not done, after asking; those at work are left alone.

    Raises:
        UsageError: The folder holds no sweep.
    """
    from daft_domainbed.launch.plan_file import read_jobs
    from daft_domainbed.launch.states import is_done, read_states
    from daft_domainbed.runtime import locks

    jobs = read_jobs(root)
    states = read_states(root, jobs)
    kinds = ("incomplete", "failed")
    # A store outside the sweep is others', too.
    folders = [
        root / job.folder for job in jobs if states[job.folder].kind in kinds and not Path(job.folder).is_absolute()
    ]
    if not folders:
        print("nothing is incomplete")
        return
    if ask:
        _print_summary(root, jobs)
        if not _confirm(f"Delete {len(folders)} incomplete runs, with all that they have learnt?"):
            return
    n_deleted = 0
    for folder in folders:
        with suppress(locks.Claimed), locks.claim(folder):
            if is_done(folder):  # by another launch, in the meantime
                continue
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():  # logs of an algorithm of the user's
                    shutil.rmtree(path)
                elif path.name != locks.LOCK_FILE:  # by which the folder is ours until it is empty
                    path.unlink()
            n_deleted += 1
        with suppress(OSError):  # somebody has begun anew
            folder.rmdir()
    print(f"deleted {n_deleted} incomplete runs")


def _print_summary(root: Path, jobs: Sequence[Job]) -> None:
    from daft_domainbed.launch import summary
    from daft_domainbed.launch.states import read_states

    states = read_states(root, jobs)
    parts = (
        f"{root}: {len(jobs)} jobs",
        summary.format_counts(jobs, states),
        summary.format_failures(jobs, states),
        summary.format_time(root, jobs, states),
        summary.format_disk(root, jobs, states),
    )
    print("\n".join(filter(None, parts)), flush=True)


def _confirm(question: str) -> bool:
    print(f"{question} (y/n) ", end="", file=sys.stderr, flush=True)
    try:
        answer = input()
    except EOFError:
        print(file=sys.stderr)
        raise UsageError("nobody is there to answer: add --skip_confirmation") from None
    if answer.strip().lower() in ("y", "yes"):
        return True
    print("nothing was done, as you wished", file=sys.stderr)
    return False


def _keep_chosen(root: Path) -> None:
    from daft_domainbed.launch.plan_file import read_jobs
    from daft_domainbed.launch.retention import remove_weights
    from daft_domainbed.launch.summary import format_bytes
    from daft_domainbed.results.selection import SELECTIONS, choose, group_runs
    from daft_domainbed.results.sweeps import read_sweep

    groups = group_runs(read_sweep(root)).items()
    choices = [choose(rule, runs, group.test_env, group.held_out) for group, runs in groups for rule in SELECTIONS]
    freed = remove_weights(root, read_jobs(root), {choice.run.folder for choice in choices if choice})
    print(f"removed the weights that no selection chose: {format_bytes(freed)}", file=sys.stderr)
