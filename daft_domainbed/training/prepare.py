"""Which run do these arguments ask for, and can it be?"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.data.splits import NO_UNLABELLED, Data, Sizes, build_data, check_sizes, count_images
from daft_domainbed.embedded.image_folder import list_notes
from daft_domainbed.errors import UsageError
from daft_domainbed.host.contract import DatasetFacts, Host, describe_dataset, find_host, get_algorithm_class
from daft_domainbed.hparams import parse_json, split_hparams
from daft_domainbed.methods import list_stages
from daft_domainbed.plugin.defaults import (
    check_input,
    check_own_hparams,
    check_user_hparams,
    get_default_hparams,
    get_known_hparams,
    get_random_hparams,
    resolve_auto,
)
from daft_domainbed.plugin.registration import register
from daft_domainbed.runtime.layout import TEACHERS_FOLDER
from daft_domainbed.runtime.machine import find_device
from daft_domainbed.runtime.randomness import preserve_states
from daft_domainbed.teachers.facts import RunFacts
from daft_domainbed.training.mirror import check_logs
from daft_domainbed.training.precision import check_precision

_LARGEST_SEED = 2**32 - 1  # NumPy's


@dataclass(frozen=True)
class Prepared:
    """Arguments that were checked, with what follows from them.

    Attributes:
        args: As given.
        host: Registered.
        dataset: What is known of the data set.
        user_hparams: What the user gave in `--hparams` that is not for one algorithm alone; teachers are given it, too.
        hparams: All hyperparameters of the run.
        device: On which it computes.
        n_steps: Number of updates.
        checkpoint_freq: Updates between evaluations.
        lengths: Images of each environment, where the data were looked at.
    """

    args: TrainArgs
    host: Host
    dataset: DatasetFacts
    user_hparams: dict[str, Any]
    hparams: dict[str, Any]
    device: torch.device
    n_steps: int
    checkpoint_freq: int
    lengths: tuple[int, ...] = ()

    @property
    def complete_args(self) -> TrainArgs:
        """The arguments with the number of steps, as provenance and teachers need them."""
        return replace(self.args, steps=self.n_steps)


def prepare(args: TrainArgs) -> Prepared:
    """Check a run's arguments.

    Raises:
        UsageError: Names the argument, its value and what to do.
    """
    host = find_host(args.host)
    register(host)
    get_algorithm_class(host, args.algorithm)
    given = parse_json(args.hparams)
    user, own = split_hparams(given, args.algorithm)
    dataset = describe_dataset(host, args.dataset, user, args.data_path)
    check_test_envs(args.test_envs, dataset)
    if not 0 < args.holdout_fraction < 1:
        raise UsageError(f"--holdout_fraction is {args.holdout_fraction}: it must lie between 0 and 1")
    if not 0 <= args.uda_holdout_fraction < 1:
        raise UsageError(f"--uda_holdout_fraction is {args.uda_holdout_fraction}: it must be at least 0 and below 1")
    device = find_device(args.device)
    check_precision(args.precision, device, args.algorithm)
    check_logs(args.log or ())
    stages = list_stages(args.algorithm, user | own)
    check_input(stages, dataset)
    check_user_hparams(host, user, stages, dataset, asked=stages)
    check_own_hparams(host, given, host.algorithms.ALGORITHMS, dataset, where=f"in host {host.name}")
    hparams = choose_hparams(host, args, dataset, user | own)
    resolve_auto(args.algorithm, hparams)  # refuses what cannot be before anything is trained for it
    kind = dataset.dataset_class
    n_steps = kind.N_STEPS if args.steps is None else args.steps
    checkpoint_freq = kind.CHECKPOINT_FREQ if args.checkpoint_freq is None else args.checkpoint_freq
    for name, value in (("--steps", n_steps), ("--checkpoint_freq", checkpoint_freq)):
        if value < 1:
            raise UsageError(f"{name} is {value}: it must be at least 1")
    for name, seed in (("--seed", args.seed), ("--data_seed", args.data_seed)):
        if seed is not None and not 0 <= seed <= _LARGEST_SEED:
            raise UsageError(f"{name} is {seed}: it must lie between 0 and {_LARGEST_SEED}")
    _check_moments(hparams, n_steps)
    return Prepared(args, host, dataset, user, hparams, device, n_steps, checkpoint_freq)


def _check_moments(hparams: Mapping[str, Any], n_steps: int) -> None:
    """Refuse what would never happen in so few steps."""
    for name in ("average_start", "probe_steps"):
        value = hparams.get(name, 0)
        if value != "never" and value >= n_steps:
            raise UsageError(f"hyperparameter {name} is {value}: it must be below the {n_steps} steps of the run")


def check_test_envs(test_envs: Sequence[int], dataset: DatasetFacts) -> None:
    """Refuse test environments that do not exist, repeat, or leave nothing to train on.

    Raises:
        UsageError: Names the value.
    """
    n_envs, given = len(dataset.environments), f"--test_envs {' '.join(map(str, test_envs))}"
    for env in test_envs:
        if not 0 <= env < n_envs:
            raise UsageError(f"--test_envs {env}: {dataset.name} has {n_envs} environments, numbered 0 to {n_envs - 1}")
    if len(set(test_envs)) < len(test_envs):
        raise UsageError(f"{given}: an environment is named twice")
    if len(test_envs) >= n_envs:
        raise UsageError(
            f"{given}: all {n_envs} environments of {dataset.name} are held out; leave at least one to train on"
        )


def choose_hparams(host: Host, args: TrainArgs, dataset: DatasetFacts, user: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a run: defaults or a random draw, then the user's own, which were checked."""
    if args.hparams_seed:
        seed = host.misc.seed_hash(args.hparams_seed, args.trial_seed)
        chosen = get_random_hparams(host, args.algorithm, dataset, seed)
    else:
        chosen = get_default_hparams(host, args.algorithm, dataset)
    known = get_known_hparams(host, args.algorithm, dataset, user) if user else {}
    return chosen | {name: value for name, value in user.items() if name in known}


def prepare_first_runs(runs: Iterable[TrainArgs]) -> dict[tuple[str, str], Prepared]:
    """Check what every run of a sweep would be refused for, data included; return what they share.

    Args:
        runs: One of each data set and algorithm.

    Returns:
        By data set and algorithm.

    Raises:
        UsageError: A run, or the data, cannot be.
    """
    prepared: dict[tuple[str, str], Prepared] = {}
    data: dict[str, Data] = {}
    for args in runs:
        run = prepare(args)
        if args.dataset not in data:
            with preserve_states():
                data[args.dataset] = build_data(run.host, args, run.hparams, run.dataset.dataset_class)
        check_data(data[args.dataset], run)
        prepared[args.dataset, args.algorithm] = replace(run, lengths=tuple(data[args.dataset].lengths))
    for name, built in data.items():
        for note in list_notes(name, built.dataset):
            print(note, file=sys.stderr)
    return prepared


def check_data(data: Data, run: Prepared) -> Sizes:
    """Refuse environments that are too small for a run, or that lack the unlabelled images of its task.

    Returns:
        How many images it has.

    Raises:
        UsageError: Names the environment, or the flag.
    """
    sizes = count_images(data.lengths, run.args, run.dataset.environments)
    check_sizes(sizes, run.args, run.hparams)
    if run.args.task == "domain_adaptation" and not data.uda_splits:
        raise UsageError(NO_UNLABELLED)
    return sizes


def gather_facts(
    args: TrainArgs,
    host: Host,
    dataset: DatasetFacts,
    data: Data,
    user_hparams: Mapping[str, Any],
    hparams: Mapping[str, Any],
    folder: Path,
) -> RunFacts:
    """Return what has to be known of a run to find, make and check its teachers.

    Args:
        args: Of the run, with the number of steps.
        host: Whose parts it uses.
        dataset: What its class tells.
        data: The data themselves, split.
        user_hparams: What the user gave.
        hparams: All of the run's.
        folder: Of the run.
    """
    return RunFacts(
        args=args,
        user_hparams=user_hparams,
        hparams=hparams,
        dataset=dataset,
        num_classes=data.dataset.num_classes,
        input_shape=tuple(data.dataset.input_shape),
        splits=data.list_splits(),
        host=host,
        output_dir=folder.resolve(),
        teachers_dir=Path(args.teachers_dir) if args.teachers_dir else folder.resolve().parent / TEACHERS_FOLDER,
        device=find_device(args.device),
    )
