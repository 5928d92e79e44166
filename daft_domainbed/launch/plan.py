"""What a sweep consists of: every run, and the teachers that it needs, each once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import md5
from pathlib import Path
from typing import Any, Literal

from daft_domainbed import hparams, plugin
from daft_domainbed.arguments import (
    TrainArgs,
    check_test_envs,
    list_stages,
    make_request,
    make_teacher_args,
    prepare,
    resolve_hparams,
)
from daft_domainbed.checkpoints import write_text
from daft_domainbed.errors import UsageError
from daft_domainbed.locks import is_claimed
from daft_domainbed.randomness import preserve_states
from daft_domainbed.run_folder import RECORDS_FILE, own
from daft_domainbed.splits import NO_UNLABELLED, build_data, check_sizes
from daft_domainbed.teacher import plan_teacher

PLAN_FILE = "plan.json"
QUEUE_FILE = "slurm/jobs.json"
SCHEMA = 1

Stage = Literal["erm_teacher", "aft_teacher", "student"]
STAGES: tuple[Stage, ...] = ("erm_teacher", "aft_teacher", "student")


def _merge(old: Iterable[str], new: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*old, *new]))


# These may grow from one launch of a sweep to the next; with anything else changed it would be another sweep.
_MAY_GROW: dict[str, Callable[[Any, Any], Any]] = {
    "datasets": _merge,
    "algorithms": _merge,
    "n_trials": max,
    "n_trials_from": min,
    "n_hparams": max,
    "n_hparams_from": min,
}
# Where a sweep lies and what it runs on do not make it another sweep.
_INCIDENTAL = ("output_dir", "data_dir", "teachers_dir", "image_cache", "feature_cache", "device")


@dataclass(frozen=True)
class SweepArgs:
    """The arguments of a sweep: DomainBed's sweep flags, and those that every run of it shares."""

    datasets: list[str]
    algorithms: list[str]
    output_dir: str
    n_trials: int = 3
    n_trials_from: int = 0
    n_hparams: int = 20
    n_hparams_from: int = 0
    seed: int = 0
    single_test_envs: bool = False
    hparams: str | None = None
    steps: int | None = None
    checkpoint_freq: int | None = None
    data_dir: str | None = None
    task: str = "domain_generalization"
    holdout_fraction: float = 0.2
    uda_holdout_fraction: float = 0.0
    skip_model_save: bool = False
    host: str = "embedded"
    device: str = "auto"
    precision: str = "fp32"
    teachers_dir: str | None = None
    image_cache: str | None = None
    feature_cache: str | None = None
    threads: int = 1


@dataclass(frozen=True)
class Job:
    """One training run of a sweep.

    Attributes:
        stage: What the run is for.
        folder: Its output folder, relative to the sweep's where it lies inside.
        args: Its arguments.
        needs: Folders of the teachers that have to be there before.
        imports: What adds the user's own algorithms: modules, or paths of scripts.
    """

    stage: Stage
    folder: str
    args: TrainArgs
    needs: list[str] = field(default_factory=list)
    imports: list[str] = field(default_factory=plugin.list_sources)


def make_plan(sweep: SweepArgs) -> list[Job]:
    """Return all jobs of a sweep, teachers before those that need them.

    All algorithms, stages and hyperparameter draws of one (data set, test environments, trial) share one seed, so
    that comparisons are paired and teachers shared.

    Raises:
        UsageError: An unknown name, or a hyperparameter that no algorithm of the sweep knows.
    """
    for name, first, end, what in (
        ("n_trials", sweep.n_trials_from, sweep.n_trials, "trials"),
        ("n_hparams", sweep.n_hparams_from, sweep.n_hparams, "draws"),
    ):
        if first >= end:
            raise UsageError(
                f"--{name}_from {first} leaves none of the {what}, which end before --{name} {end}: "
                "choose a smaller one"
            )
    host = plugin.find_host(sweep.host)
    plugin.register(host)
    user = hparams.parse_json(sweep.hparams)
    _check_hparams(host, sweep, user)
    _check_first_runs(sweep, list(_list_students(host, sweep, user)))
    jobs: dict[str, Job] = {}
    for args in _list_students(host, sweep, user):
        chain = _plan_chain(host, sweep, args)
        for job in reversed(chain):
            jobs.setdefault(job.folder, job)
    return sorted(jobs.values(), key=lambda job: STAGES.index(job.stage))


def write_plan(sweep: SweepArgs, jobs: list[Job]) -> None:
    """Store a sweep's plan in its folder; a sweep may grow, but not become another one.

    Raises:
        UsageError: The folder holds a sweep with other arguments.
    """
    root = Path(sweep.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    with own(root, wait=True):  # another launch may be writing it
        _write_plan(root / PLAN_FILE, sweep, jobs)


def check_plan(sweep: SweepArgs) -> None:
    """Make sure that a sweep's folder holds no other sweep.

    Raises:
        UsageError: It does.
    """
    _read_begun(Path(sweep.output_dir) / PLAN_FILE, asdict(sweep))


def _read_begun(path: Path, args: dict[str, Any]) -> dict[str, Any] | None:
    """Return the stored plan that a sweep grows from, or None where there is none of which anything came."""
    old = _read_plan(path)
    is_queued = (path.parent / QUEUE_FILE).is_file()
    if old is None or not (is_queued or any(_is_begun(path.parent / job["folder"]) for job in old["jobs"])):
        return None  # most likely it was a mistake
    _check_growth(old["args"], args, path.parent)
    return old


def _write_plan(path: Path, sweep: SweepArgs, jobs: list[Job]) -> None:
    args = asdict(sweep)
    old = _read_begun(path, args)
    environments = {name: plugin.get_environments(plugin.find_host(sweep.host), name) for name in sweep.datasets}
    known = {job.folder for job in jobs}
    content = {
        "schema": SCHEMA,
        "args": {name: value for name, value in args.items() if name not in _INCIDENTAL}
        | ({name: merge(old["args"][name], args[name]) for name, merge in _MAY_GROW.items()} if old else {}),
        "environments": (old or {}).get("environments", {}) | environments,
        "jobs": [asdict(job) for job in jobs]
        + [job for job in (old or {}).get("jobs", []) if job["folder"] not in known],
    }
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _is_begun(folder: Path) -> bool:
    return (folder / RECORDS_FILE).is_file() or is_claimed(folder)


def read_sweep_args(root: Path) -> dict[str, Any]:
    """Return the arguments that a stored sweep was planned with, without what does not make it another sweep.

    Raises:
        UsageError: The folder has no plan, or one that cannot be read.
    """
    args: dict[str, Any] = _read_stored(root)["args"]
    return args


def read_jobs(root: Path) -> list[Job]:
    """Return the jobs of a stored plan, teachers before those that need them.

    Raises:
        UsageError: The folder has no plan, or one that cannot be read.
    """
    try:
        return [Job(**job | {"args": TrainArgs(**job["args"])}) for job in _read_stored(root)["jobs"]]
    except TypeError as error:
        raise UsageError(f"{root / PLAN_FILE} is of another version ({error}): launch the sweep again") from error


def _read_stored(root: Path) -> dict[str, Any]:
    plan = _read_plan(root / PLAN_FILE)
    if plan is None:
        raise UsageError(f"{root} holds no sweep: it has no {PLAN_FILE}; 'daft-domainbed sweep launch' writes it")
    return plan


def _read_plan(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
        plan["args"] = {"n_trials_from": 0, "n_hparams_from": 0} | dict(plan["args"])  # an older plan has neither
        plan["jobs"] = [job | {"folder": job["folder"]} for job in plan["jobs"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is no plan of a sweep ({error}): delete it, the runs beside it are kept") from error
    return plan


def _check_growth(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    for name in ("n_trials", "n_hparams"):
        first = f"{name}_from"
        is_empty = new[first] >= new[name]  # which has a message of its own
        if not is_empty and (new[first] > old[name] or new[name] < old[first]):
            raise UsageError(
                f"{folder} holds {name[2:]} {old[first]} to {old[name] - 1}, and {new[first]} to {new[name] - 1} would "
                f"leave a gap: fill it with --{first}, or choose another --output_dir"
            )
    different = [
        f"{name} is {old.get(name)} there and {value} here"
        for name, value in new.items()
        if name not in (*_MAY_GROW, *_INCIDENTAL) and old.get(name) != value
    ]
    if different:
        raise UsageError(
            f"{folder} holds a sweep with other arguments ({'; '.join(different)}): choose another --output_dir"
        )


def _check_hparams(host: plugin.Host, sweep: SweepArgs, user: dict[str, Any]) -> None:
    """Refuse names that no algorithm of the sweep knows, and impossible values; each job is then given its own."""
    stages = {stage for algorithm in sweep.algorithms for stage in list_stages(algorithm)}
    for algorithm in sweep.algorithms:
        plugin.get_algorithm_class(host, algorithm)
    for dataset in sweep.datasets:
        plugin.get_dataset_class(host, dataset)
        defaults = [plugin.get_default_hparams(host, stage, dataset, user) for stage in stages]
        hparams.check_names(user, {name for known in defaults for name in known}, sweep.algorithms)
        for known in defaults:
            hparams.check_values(user, known)


def _check_first_runs(sweep: SweepArgs, students: list[TrainArgs]) -> None:
    """Refuse what every run of a sweep would be refused for, before the sweep has a folder."""
    first: dict[tuple[str, str], TrainArgs] = {}
    for args in students:
        first.setdefault((args.dataset, args.algorithm), args)
    for dataset in sweep.datasets:
        data = None
        for algorithm in sweep.algorithms:
            job = prepare(first[dataset, algorithm])
            request = make_request(job.args, job.n_steps)
            if data is None:
                with preserve_states():
                    data = build_data(job.host, request, job.hparams, job.dataset_class)
            check_sizes(data, request, job.hparams, job.dataset_class.ENVIRONMENTS)
            if job.args.task == "domain_adaptation" and not data.uda_splits:
                raise UsageError(NO_UNLABELLED)


def _list_students(host: plugin.Host, sweep: SweepArgs, user: dict[str, Any]) -> Iterator[TrainArgs]:
    more_seed = [sweep.seed] if sweep.seed else []
    for trial_seed in range(sweep.n_trials_from, sweep.n_trials):
        for dataset in sweep.datasets:
            n_envs = len(plugin.get_environments(host, dataset))
            for algorithm in sweep.algorithms:
                known: set[str] = set()
                for stage in list_stages(algorithm):
                    known |= plugin.get_default_hparams(host, stage, dataset, user).keys()
                own = {name: value for name, value in user.items() if name in known}
                for test_envs in list_test_envs(n_envs, single=sweep.single_test_envs):
                    check_test_envs(test_envs, n_envs, dataset)
                    for hparams_seed in range(sweep.n_hparams_from, sweep.n_hparams):
                        yield TrainArgs(
                            dataset=dataset,
                            algorithm=algorithm,
                            task=sweep.task,
                            hparams=json.dumps(own, sort_keys=True) if own else None,
                            hparams_seed=hparams_seed,
                            trial_seed=trial_seed,
                            seed=host.misc.seed_hash(dataset, test_envs, trial_seed, *more_seed),
                            steps=sweep.steps,
                            checkpoint_freq=sweep.checkpoint_freq,
                            test_envs=test_envs,
                            data_dir=sweep.data_dir,
                            holdout_fraction=sweep.holdout_fraction,
                            uda_holdout_fraction=sweep.uda_holdout_fraction,
                            skip_model_save=sweep.skip_model_save,
                            host=sweep.host,
                            device=sweep.device,
                            precision=sweep.precision,
                            image_cache=sweep.image_cache,
                            feature_cache=sweep.feature_cache,
                        )


def list_test_envs(n_envs: int, *, single: bool) -> list[list[int]]:
    """Return the sets of test environments of a sweep: each alone and, unless told otherwise, each pair.

    Example:
        >>> list_test_envs(3, single=False)
        [[0], [0, 1], [0, 2], [1], [1, 2], [2]]
    """
    combinations = []
    for i in range(n_envs):
        combinations.append([i])
        # A pair has to leave something to train on.
        combinations += [] if single or n_envs < 3 else [[i, j] for j in range(i + 1, n_envs)]
    return combinations


def _plan_chain(host: plugin.Host, sweep: SweepArgs, student: TrainArgs) -> list[Job]:
    """Return a student's job, then its teacher's, then that one's teacher's."""
    root = Path(sweep.output_dir)
    store = Path(sweep.teachers_dir) if sweep.teachers_dir else root / "teachers"
    identity = {name: value for name, value in asdict(student).items() if name not in _INCIDENTAL}
    folder = md5(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    args = replace(student, output_dir=str(root / folder), teachers_dir=str(store))
    jobs = [Job("student", folder, args)]
    while args.algorithm in hparams.TEACHER_KINDS:
        user = hparams.parse_json(args.hparams)
        resolved = resolve_hparams(host, args, user)
        if resolved["teacher"] != "auto":
            break
        n_steps = args.steps or plugin.get_dataset_class(host, args.dataset).N_STEPS
        job = plan_teacher(args.algorithm, resolved, make_request(args, n_steps), user, host, args.precision)
        args = make_teacher_args(args, job.request, job.hparams, store / job.identity)
        teacher = _name_folder(store / job.identity, root)
        jobs[-1].needs.append(teacher)
        jobs.append(Job("aft_teacher" if args.algorithm == "AFT" else "erm_teacher", teacher, args))
    return jobs


def _name_folder(folder: Path, root: Path) -> str:
    inside = folder.resolve().is_relative_to(root.resolve())
    return folder.resolve().relative_to(root.resolve()).as_posix() if inside else str(folder.resolve())
