"""What a sweep consists of: every run, and the teachers that it needs, each once."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from typing import Any

from daft_domainbed.arguments import SharedArgs, SweepArgs, TrainArgs, get_identity
from daft_domainbed.data.place import settle_data
from daft_domainbed.data.splits import check_sizes, count_images
from daft_domainbed.errors import UsageError
from daft_domainbed.host.contract import DatasetFacts, Host, describe_dataset, find_host, get_algorithm_class
from daft_domainbed.hparams import parse_json, split_hparams
from daft_domainbed.launch.domains import check_flags, list_test_envs
from daft_domainbed.launch.job import Job, group_by_depth
from daft_domainbed.methods import STUDENT, list_stages, name_stage
from daft_domainbed.plugin.defaults import check_own_hparams, check_user_hparams, get_known_hparams
from daft_domainbed.plugin.registration import list_sources, list_unimportable, register
from daft_domainbed.runtime.layout import TEACHERS_FOLDER
from daft_domainbed.teachers.plan import list_slots_to_make, plan_teacher
from daft_domainbed.training.first_network import keep_first_network
from daft_domainbed.training.prepare import Prepared, check_test_envs, choose_hparams, prepare_first_runs


def make_plan(sweep: SweepArgs, cwd: str = "", begun: Collection[str] = (), *, is_of_before: bool = False) -> list[Job]:
    """Return all jobs of a sweep, teachers before those that need them.

    All algorithms, stages and hyperparameter draws of one (data set, test environments, trial) share one seed, so
    that comparisons are paired and teachers shared.

    Args:
        sweep: What is asked for.
        cwd: The folder that relative paths in hyperparameters count from, if not that of each job's process.
        begun: Folders of jobs that were planned before draws were checked, or are under way.
        is_of_before: Whether it was begun when students had other default networks, which it then keeps.

    Raises:
        UsageError: An unknown name, or a hyperparameter that no algorithm of the sweep knows.
    """
    _check_counts(sweep)
    check_flags(sweep)
    host, user = find_host(sweep.host), parse_json(sweep.hparams)
    register(host)
    for algorithm in sweep.algorithms:
        get_algorithm_class(host, algorithm)
    if any(name.startswith("folder:") and name not in sweep.data for name in sweep.datasets):
        sweep = settle_data(sweep, {})
    places = {name: place["data_path"] for name, place in sweep.data.items()}
    datasets = [describe_dataset(host, name, user, places.get(name)) for name in sweep.datasets]
    shared = split_hparams(user, "")[0]
    stages = dict.fromkeys(stage for algorithm in sweep.algorithms for stage in _list_stages(algorithm, user))
    if lost := list_unimportable(stages):
        raise UsageError(
            f"{lost[0]} was added where no job of a sweep finds it (a notebook, python -c, standard input): put its "
            "class and add_algorithm into a file, and import that"
        )
    for dataset in datasets:
        check_user_hparams(host, shared, list(stages), dataset, asked=sweep.algorithms)
        check_own_hparams(host, user, sweep.algorithms, dataset, where="in the sweep")
    students = list(_list_students(host, sweep, user, datasets))
    first: dict[tuple[str, str], TrainArgs] = {}
    for args in students:
        first.setdefault((args.dataset, args.algorithm), args)
    prepared = prepare_first_runs(first.values())
    jobs = _Jobs(Path(sweep.output_dir), sweep.teachers_dir, cwd, begun, is_of_before)
    for args in students:
        jobs.add_student(args, prepared[args.dataset, args.algorithm])
    return [job for group in group_by_depth(jobs.by_folder.values()) for job in group]


def _check_counts(sweep: SweepArgs) -> None:
    for name, first, end, what in (
        ("n_trials", sweep.n_trials_from, sweep.n_trials, "trials"),
        ("n_hparams", sweep.n_hparams_from, sweep.n_hparams, "draws"),
    ):
        if first >= end:
            raise UsageError(
                f"--{name}_from {first} leaves none of the {what}, which end before --{name} {end}: "
                "choose a smaller one"
            )


def _choose_interval(sweep: SweepArgs, dataset: DatasetFacts) -> int | None:
    """Return the updates between evaluations; DomainBed's own interval, or the one that was given, is None."""
    if sweep.n_checkpoints is None:
        return sweep.checkpoint_freq
    if sweep.checkpoint_freq is not None:
        raise UsageError("--n_checkpoints and --checkpoint_freq both say when to evaluate: give one of them")
    return math.ceil((sweep.steps or dataset.dataset_class.N_STEPS) / sweep.n_checkpoints)


def _list_students(
    host: Host, sweep: SweepArgs, user: Mapping[str, Any], datasets: list[DatasetFacts]
) -> Iterator[TrainArgs]:
    more_seed = [sweep.seed] if sweep.seed else []
    common = {name: getattr(sweep, name) for name in SharedArgs.__dataclass_fields__ if name != "teachers_dir"}
    known = {
        (dataset.name, algorithm): _keep_known(host, user, algorithm, dataset)
        for dataset in datasets
        for algorithm in sweep.algorithms
    }
    for trial_seed in range(sweep.n_trials_from, sweep.n_trials):
        for dataset in datasets:
            for algorithm in sweep.algorithms:
                for test_envs in list_test_envs(sweep, dataset.environments, dataset.name):
                    check_test_envs(test_envs, dataset)
                    given = _add_chosen(
                        known[dataset.name, algorithm], sweep.chosen, dataset.name, algorithm, test_envs
                    )
                    for hparams_seed in range(sweep.n_hparams_from, sweep.n_hparams):
                        own = {
                            "dataset": dataset.name,
                            **sweep.data.get(dataset.name, {}),
                            "algorithm": algorithm,
                            "hparams": json.dumps(given, sort_keys=True) if given else None,
                            "hparams_seed": hparams_seed,
                            "trial_seed": trial_seed,
                            "seed": host.misc.seed_hash(dataset.name, test_envs, trial_seed, *more_seed),
                            "test_envs": test_envs,
                            "checkpoint_freq": _choose_interval(sweep, dataset),
                        }
                        yield TrainArgs(**common | own)


def _list_stages(algorithm: str, user: Mapping[str, Any]) -> list[str]:
    """Return an algorithm and those that make its teachers, with what was given to all and to it alone."""
    shared, own = split_hparams(user, algorithm)
    return list_stages(algorithm, shared | own)


def _keep_known(host: Host, user: Mapping[str, Any], algorithm: str, dataset: DatasetFacts) -> dict[str, Any]:
    """Return what of the user's an algorithm and its teachers know, and what is for the algorithm alone."""
    shared, own = split_hparams(user, algorithm)
    stages = _list_stages(algorithm, user)
    known = {name for stage in stages for name in get_known_hparams(host, stage, dataset, shared | own)}
    kept = {name: value for name, value in shared.items() if name in known}
    return kept | ({algorithm: own} if own else {})


def forget_unknown(sweep: SweepArgs) -> SweepArgs:
    """Return a sweep without the hyperparameters that none of its algorithms knows: it had more of them before.

    Raises:
        UsageError: An unknown name.
    """
    host, user = find_host(sweep.host), parse_json(sweep.hparams)
    register(host)
    known: dict[str, Any] = {}
    for name in sweep.datasets:
        dataset = describe_dataset(host, name, user, sweep.data.get(name, {}).get("data_path"))
        for algorithm in sweep.algorithms:
            known |= _keep_known(host, user, algorithm, dataset)
    kept = {name: value for name, value in user.items() if name in known}
    return sweep if kept == user else replace(sweep, hparams=json.dumps(kept) if kept else None)


def _add_chosen(
    given: dict[str, Any], chosen: Mapping[str, Any] | None, dataset: str, algorithm: str, test_envs: list[int]
) -> dict[str, Any]:
    """Return what is given to a student, with the settings that were chosen for it; the user's own come first."""
    for setting in (chosen or {}).get("settings", []):
        place = (setting["dataset"], setting["algorithm"])
        if place == (dataset, algorithm) and setting["test_env"] in (None, test_envs[0]):
            own = setting["hparams"] | given.get(algorithm, {})
            return given | ({algorithm: own} if own else {})
    return given


class _Jobs:
    """The jobs of a sweep by folder, each once."""

    def __init__(
        self, root: Path, teachers_dir: str | None, cwd: str, begun: Collection[str], is_of_before: bool
    ) -> None:
        self.root, self.cwd, self.begun, self.is_of_before = root, cwd, begun, is_of_before
        self.store = Path(teachers_dir) if teachers_dir else root / TEACHERS_FOLDER
        inside, here = self.store.resolve(), root.resolve()
        self.store_name = inside.relative_to(here).as_posix() if inside.is_relative_to(here) else str(inside)
        self.by_folder: dict[str, Job] = {}

    def add_student(self, student: TrainArgs, shared: Prepared) -> None:
        """Add a student's job, and those that make its teachers, as far as there is none like them."""
        folder = md5(json.dumps(get_identity(student), sort_keys=True).encode()).hexdigest()
        args = replace(student, output_dir=str(self.root / folder), teachers_dir=str(self.store))
        args = keep_first_network(args) if self.is_of_before else args
        user, own = split_hparams(parse_json(args.hparams), args.algorithm)
        hparams = choose_hparams(shared.host, args, shared.dataset, user | own)
        complete = replace(args, steps=args.steps or shared.n_steps)
        if folder not in self.begun:
            _check_draw(complete, hparams, shared)
        needs = self._add_teachers(complete, hparams, user, shared)
        self.by_folder.setdefault(folder, Job(STUDENT, folder, args, needs, list_sources(), self.cwd))

    def _add_teachers(
        self, args: TrainArgs, hparams: Mapping[str, Any], user: Mapping[str, Any], shared: Prepared
    ) -> list[str]:
        """Add the jobs that make a run's teachers; return their folders."""
        folders = []
        for slot in list_slots_to_make(args.algorithm, hparams):
            teacher = plan_teacher(slot, hparams, args, user, shared.host, shared.dataset)
            folder = f"{self.store_name}/{teacher.identity}"
            folders.append(folder)
            if folder not in self.by_folder:
                placed = teacher.place(self.store)
                own = choose_hparams(shared.host, placed, shared.dataset, teacher.hparams)
                if folder not in self.begun:
                    _check_draw(placed, own, shared)
                needs = self._add_teachers(placed, own, teacher.hparams, shared)
                self.by_folder[folder] = Job(
                    name_stage(placed.algorithm), folder, placed, needs, list_sources(), self.cwd
                )
        return folders


def _check_draw(args: TrainArgs, hparams: Mapping[str, Any], shared: Prepared) -> None:
    """Refuse a draw that the data cannot serve, before anything is launched."""
    check_sizes(count_images(shared.lengths, args, shared.dataset.environments), args, hparams)
