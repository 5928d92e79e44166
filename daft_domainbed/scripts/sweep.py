"""Launch a sweep with every stage that it needs, show how it stands, or remove what is incomplete.

`launch` again goes on with what is not done; what is trained, and with how many threads, is then taken from the sweep.
`status` needs --output_dir alone. Launchers: local, multi_gpu, slurm, ray, dummy (prints the commands), one of an
installed package, or one of your DomainBed's with --host upstream.

Example:
    daft-domainbed sweep launch --datasets EmojiStyles --n_trials 3 --n_hparams 1 --single_test_envs --output_dir runs/e
    daft-domainbed sweep launch --config sweeps/pacs/sweep.yaml --data_dir data --command_launcher slurm
    daft-domainbed sweep status --output_dir runs/e
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daft_domainbed.cli import ArgumentParser, non_negative_int, positive_int, run_command
from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.scripts.train import add_shared_flags

if TYPE_CHECKING:
    from daft_domainbed.launch.options import Options
    from daft_domainbed.launch.plan import Job, SweepArgs

ALGORITHMS = ["ERM", "KD", "DAFT"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `sweep`; a flag that is not given is no attribute of what it parses."""
    parser = ArgumentParser(prog="daft-domainbed sweep", doc=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("command", choices=["launch", "status", "delete_incomplete"])
    parser.add_argument("--config", type=Path, help="a sweep.yaml, whose keys are these flags; flags go before it")
    parser.add_argument("--output_dir", help="the sweep's folder")
    parser.add_argument("--datasets", nargs="+", help="names of data sets, or folder:PATH")
    parser.add_argument("--algorithms", nargs="+", help=f"default: {' '.join(ALGORITHMS)}")
    parser.add_argument("--n_trials", type=positive_int, help="repetitions, each with its own splits; default: 3")
    parser.add_argument("--n_trials_from", type=non_negative_int, help="the first of the trials; default: 0")
    parser.add_argument(
        "--n_hparams", type=positive_int, help="hyperparameter draws, the first being the defaults; default: 20"
    )
    parser.add_argument("--n_hparams_from", type=non_negative_int, help="the first of the draws; default: 0")
    parser.add_argument("--single_test_envs", action="store_true", help="no pairs of held-out domains")
    parser.add_argument("--seed", type=non_negative_int, help="another one makes another sweep; default: 0")
    parser.add_argument("--steps", type=positive_int, help="updates; the data set's own number by default")
    add_shared_flags(parser)
    add_launch_flags(parser)
    parser.add_argument("--command_launcher", help="local (default), multi_gpu, slurm, ray, dummy, or one of your own")
    parser.add_argument("--skip_confirmation", action="store_true", help="do not ask")
    for action in parser._actions:  # the shared flags have defaults of their own
        action.default = argparse.SUPPRESS
    return parser


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a sweep is launched, which have no influence on its numbers."""
    parser.add_argument("--n_jobs", type=positive_int, help="jobs at a time; a core each, or a GPU each, by default")
    parser.add_argument("--threads", type=positive_int, help="threads a job, on which numbers may depend; default: 1")
    parser.add_argument("--slurm", nargs="+", metavar="KEY=VALUE", help="Slurm's own options, as in partition=gpu")
    parser.add_argument("--max_array_size", type=positive_int, help="of one Slurm job array; default: 1000")
    parser.add_argument("--ray_address", help="of a running Ray cluster; one is started on this machine by default")
    parser.add_argument(
        "--keep", choices=["all", "chosen"], help="chosen: in the end only weights that a selection chose stay"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Launch, show or clean a sweep."""
    given = vars(build_parser().parse_args(argv))
    on_command_line = given
    if "config" in given:
        given = read_config(given["config"], given["command"]) | given
    launcher = given.get("command_launcher", "local")
    command = given.pop("command")
    if "output_dir" not in given:
        raise UsageError("--output_dir is needed: the sweep's folder")
    root = Path(given["output_dir"])
    if command == "status":
        show_status(root)
    elif command == "delete_incomplete":
        delete_incomplete(root, ask=not given.get("skip_confirmation", False))
    else:
        options = make_options(given)
        _check_launcher_flags(on_command_line, launcher)
        is_launched = launch(
            collect_sweep_args(given),
            options,
            launcher=launcher,
            ask=not given.get("skip_confirmation", False),
            keep=given.get("keep", "all"),
        )
        if is_launched:
            print(f"results: daft-domainbed collect_results --input_dir {shlex.quote(str(root))}", file=sys.stderr)
    return 0


def read_config(path: Path, command: str) -> dict[str, Any]:
    """Return the flags that a sweep.yaml holds, checked as if they had been given.

    Raises:
        UsageError: The file cannot be read, or a key is no flag.
    """
    import yaml

    try:
        content = _parse_yaml(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} holds no flags: it has to be a mapping, as in 'datasets: [PACS]'")
    arguments = [command]
    for name, value in content.items():
        if name == "hparams" and isinstance(value, dict):
            value = json.dumps(value, default=str)
        if isinstance(value, dict):
            value = [f"{key}={item}" for key, item in value.items() if item is not False and item is not None]
        if value is False or value is None:
            continue
        items = [] if value is True else value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, items)]
    try:
        return vars(build_parser().parse_args(arguments))
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from error


def _parse_yaml(text: str) -> Any:
    """Parse YAML whose numbers are JSON's: to YAML 1.1, 1:30:00 is 5400 and 1e-3 a text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    numbers = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in numbers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    whole = r"-?(0|[1-9]\d*)"
    for tag, pattern in zip(numbers, (whole, rf"({whole}(\.\d*)?|-?\.\d+)([eE][-+]?\d+)?"), strict=False):
        Loader.add_implicit_resolver(tag, re.compile(f"{pattern}$"), list("-.0123456789"))
    return yaml.load(text, Loader)


def collect_sweep_args(given: dict[str, Any]) -> SweepArgs:
    """Return a sweep's arguments: those given, else those that its folder was begun with, else the defaults.

    Raises:
        UsageError: No data set is named.
    """
    from daft_domainbed.launch.plan import PLAN_FILE, SweepArgs, read_jobs, read_sweep_args

    names = {field.name for field in fields(SweepArgs)}
    values: dict[str, Any] = {"algorithms": ALGORITHMS}
    root = Path(given["output_dir"])
    if (root / PLAN_FILE).is_file():
        values = {name: value for name, value in read_sweep_args(root).items() if name in names}
        student = next(job.args for job in read_jobs(root) if job.stage == "student")
        places = ("data_dir", "device", "teachers_dir", "image_cache", "feature_cache")
        values |= {name: getattr(student, name) for name in places}
        if Path(student.teachers_dir or "") == Path(student.output_dir).parent / "teachers":
            del values["teachers_dir"]  # the sweep's own, which moves with it
    values |= {name: value for name, value in given.items() if name in names}
    if not values.get("datasets"):
        raise UsageError("--datasets is needed, as in --datasets EmojiStyles; 'daft-domainbed doctor' lists them")
    return SweepArgs(**values)


def make_options(given: dict[str, Any]) -> Options:
    """Return what was given of the launch flags.

    Raises:
        UsageError: A Slurm option is not KEY=VALUE.
    """
    from daft_domainbed.launch.options import Options

    slurm = {}
    for text in given.get("slurm") or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"--slurm {text!r}: write KEY=VALUE, as in partition=gpu")
        slurm[key] = value
    names = {field.name for field in fields(Options)} - {"slurm", "threads"}  # the latter is the sweep's
    return Options(slurm=slurm, **{name: value for name, value in given.items() if name in names and value is not None})


def launch(sweep: SweepArgs, options: Options, *, launcher: str, ask: bool, keep: str = "all") -> bool:
    """Plan a sweep and run what is not done of it; return whether that was allowed.

    Raises:
        UsageError: The sweep, or the launcher, cannot be.
        RunError: A job failed; the others were run nevertheless.
        Stopped: By a signal; the jobs that were running have saved where they are.
    """
    from daft_domainbed import stopping
    from daft_domainbed.launch.launchers import find_launcher
    from daft_domainbed.launch.plan import check_plan, make_plan, write_plan
    from daft_domainbed.launch.progress import SweepProgress
    from daft_domainbed.launch.states import is_done
    from daft_domainbed.plugin import find_host, get_environments

    run, options = find_launcher(launcher, sweep.host), replace(options, threads=sweep.threads)
    check_plan(sweep)
    jobs = make_plan(sweep)
    root = Path(sweep.output_dir)
    waiting = [job for job in jobs if not is_done(root / job.folder)]
    if ask and launcher != "dummy":
        _print_summary(root, jobs)
        if waiting and not _confirm(f"Launch {len(waiting)} jobs with {launcher}?"):
            return False
    write_plan(sweep, jobs)
    environments = {dataset: get_environments(find_host(sweep.host), dataset) for dataset in sweep.datasets}
    with (
        stopping.listening(signal.SIGINT, signal.SIGTERM),
        SweepProgress(jobs, len(jobs) - len(waiting), options.n_jobs or 1, environments) as progress,
    ):
        progress.plan(waiting)
        failures = run(root, jobs, options, progress)
    if failures:
        folder, reason = next(iter(failures.items()))
        raise RunError(f"{len(failures)} of {len(jobs)} jobs failed, the first in {root / folder}: {reason}")
    if keep == "chosen" and failures is not None:
        _keep_chosen(root)
    if not waiting:
        print(f"all {len(jobs)} jobs are done", file=sys.stderr)
    return True


def show_status(root: Path) -> None:
    """Print how a sweep stands: jobs by kind and state, failures, rate, time left, disk.

    Raises:
        UsageError: The folder holds no sweep.
    """
    from daft_domainbed.launch import slurm
    from daft_domainbed.launch.plan import read_jobs

    _print_summary(root, read_jobs(root))
    if (root / slurm.FOLDER / slurm.JOBS_FILE).is_file() and shutil.which("squeue"):
        print(f"in Slurm's queue: {len(slurm.list_queued(root))} jobs, waiting or running")


def delete_incomplete(root: Path, *, ask: bool) -> None:
    """Remove the folders of runs that were begun and are not done, after asking; those at work are left alone.

    Raises:
        UsageError: The folder holds no sweep.
    """
    from daft_domainbed import locks
    from daft_domainbed.launch.plan import read_jobs
    from daft_domainbed.launch.states import is_done, read_states

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
                if path.name != locks.LOCK_FILE:  # by which the folder is ours until it is empty
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


def _check_launcher_flags(given: dict[str, Any], launcher: str) -> None:
    """Refuse flags of a launcher that is not the one, which would be ignored in silence; a file may hold several's."""
    for flag, owner in (("slurm", "slurm"), ("ray_address", "ray")):
        if flag in given and launcher != owner:
            raise UsageError(f"--{flag} is given, and the launcher is {launcher}: add --command_launcher {owner}")


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
    from daft_domainbed.launch.plan import read_jobs
    from daft_domainbed.launch.retention import remove_weights
    from daft_domainbed.launch.summary import format_bytes
    from daft_domainbed.results.records import read_sweep
    from daft_domainbed.results.selection import SELECTIONS, choose, group_runs

    groups = group_runs(read_sweep(root).runs)
    choices = [choose(rule, runs, group.test_env) for group, runs in groups.items() for rule in SELECTIONS]
    freed = remove_weights(root, read_jobs(root), {choice.run.folder for choice in choices if choice})
    print(f"removed the weights that no selection chose: {format_bytes(freed)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command("sweep"))
