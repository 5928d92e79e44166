"""The arguments of a training run: what may be asked for, and what follows from it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from daft_domainbed import hparams, plugin
from daft_domainbed.errors import UsageError
from daft_domainbed.precision import check_precision
from daft_domainbed.provenance import Request

_LARGEST_SEED = 2**32 - 1  # NumPy's


@dataclass(frozen=True)
class TrainArgs:
    """The arguments of one training run: DomainBed's flags, and ours.

    Attributes:
        data_seed: What the data set is built under where it is not `seed`: a teacher's data are its student's.
        teachers_dir: The store of teachers; None is `teachers/` beside the output folder.
        image_cache: A folder for decoded images; None decodes each image whenever it is read.
        feature_cache: A folder for the features of frozen backbones; None keeps them for the run.
    """

    dataset: str = "RotatedMNIST"
    algorithm: str = "ERM"
    task: str = "domain_generalization"
    hparams: str | None = None
    hparams_seed: int = 0
    trial_seed: int = 0
    seed: int = 0
    steps: int | None = None
    checkpoint_freq: int | None = None
    test_envs: list[int] = field(default_factory=lambda: [0])
    output_dir: str = "train_output"
    data_dir: str | None = None
    holdout_fraction: float = 0.2
    uda_holdout_fraction: float = 0.0
    skip_model_save: bool = False
    save_model_every_checkpoint: bool = False
    host: str = "embedded"
    device: str = "auto"
    precision: str = "fp32"
    teachers_dir: str | None = None
    image_cache: str | None = None
    feature_cache: str | None = None
    data_seed: int | None = None


@dataclass(frozen=True)
class Job:
    """Arguments that were checked, with what follows from them."""

    args: TrainArgs
    host: plugin.Host
    dataset_class: Any
    user_hparams: dict[str, Any]
    hparams: dict[str, Any]
    device: torch.device
    n_steps: int
    checkpoint_freq: int


def prepare(args: TrainArgs) -> Job:
    """Check a run's arguments.

    Raises:
        UsageError: Names the argument, its value and what to do.
    """
    host = plugin.find_host(args.host)
    plugin.register(host)
    plugin.get_algorithm_class(host, args.algorithm)
    dataset_class = plugin.get_dataset_class(host, args.dataset)
    check_test_envs(args.test_envs, len(dataset_class.ENVIRONMENTS), args.dataset)
    if not 0 < args.holdout_fraction < 1:
        raise UsageError(f"--holdout_fraction is {args.holdout_fraction}: it must lie between 0 and 1")
    if not 0 <= args.uda_holdout_fraction < 1:
        raise UsageError(f"--uda_holdout_fraction is {args.uda_holdout_fraction}: it must be at least 0 and below 1")
    device = _find_device(args.device)
    check_precision(args.precision, device, args.algorithm)
    user = hparams.parse_json(args.hparams)
    resolved = resolve_hparams(host, args, user)
    n_steps = dataset_class.N_STEPS if args.steps is None else args.steps
    checkpoint_freq = dataset_class.CHECKPOINT_FREQ if args.checkpoint_freq is None else args.checkpoint_freq
    for name, value in (("--steps", n_steps), ("--checkpoint_freq", checkpoint_freq)):
        if value < 1:
            raise UsageError(f"{name} is {value}: it must be at least 1")
    for name, seed in (("--seed", args.seed), ("--data_seed", args.data_seed)):
        if seed is not None and not 0 <= seed <= _LARGEST_SEED:
            raise UsageError(f"{name} is {seed}: it must lie between 0 and {_LARGEST_SEED}")
    return Job(args, host, dataset_class, user, resolved, device, n_steps, checkpoint_freq)


def check_test_envs(test_envs: Sequence[int], n_envs: int, dataset: str) -> None:
    """Refuse test environments that do not exist, repeat, or leave nothing to train on.

    Raises:
        UsageError: Names the value.
    """
    for env in test_envs:
        if not 0 <= env < n_envs:
            raise UsageError(f"--test_envs {env}: {dataset} has {n_envs} environments, numbered 0 to {n_envs - 1}")
    if len(set(test_envs)) < len(test_envs):
        raise UsageError(f"--test_envs {' '.join(map(str, test_envs))}: an environment is named twice")
    if len(test_envs) >= n_envs:
        raise UsageError(
            f"--test_envs {' '.join(map(str, test_envs))}: all {n_envs} environments of {dataset} are held out; "
            f"leave at least one to train on"
        )


def resolve_hparams(host: plugin.Host, args: TrainArgs, user: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a run: defaults or a random draw, then the user's own.

    Raises:
        UsageError: A name that neither the algorithm nor its teachers know, or a value that cannot be.
    """
    algorithms = list_stages(args.algorithm)
    defaults = {name: plugin.get_default_hparams(host, name, args.dataset, user) for name in algorithms}
    hparams.check_names(user, {key for known in defaults.values() for key in known}, algorithms)
    for known in defaults.values():
        hparams.check_values(user, known)
    resolved = defaults[args.algorithm]
    if args.hparams_seed:
        seed = host.misc.seed_hash(args.hparams_seed, args.trial_seed)
        resolved = plugin.get_random_hparams(host, args.algorithm, args.dataset, user, seed)
    return resolved | {name: value for name, value in user.items() if name in resolved}


def list_stages(algorithm: str) -> list[str]:
    """Return an algorithm and those that make its teachers.

    Example:
        >>> list_stages("DAFT")
        ['DAFT', 'AFT', 'ERM']
    """
    stages = [algorithm]
    while stages[-1] in hparams.TEACHER_KINDS:
        stages.append(hparams.TEACHER_KINDS[stages[-1]])
    return stages


def _find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name!r} is no device: use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are visible here; use cpu or auto")
    return device


def make_request(args: TrainArgs, n_steps: int) -> Request:
    """Return a run's arguments as its provenance and its teachers need them."""
    return Request(
        dataset=args.dataset,
        algorithm=args.algorithm,
        test_envs=tuple(args.test_envs),
        trial_seed=args.trial_seed,
        seed=args.seed,
        holdout_fraction=args.holdout_fraction,
        task=args.task,
        uda_holdout_fraction=args.uda_holdout_fraction,
        steps=n_steps,
        data_dir=args.data_dir,
        data_seed=args.data_seed,
    )


def make_teacher_args(args: TrainArgs, request: Request, user: Mapping[str, Any], folder: Path) -> TrainArgs:
    """Return the arguments of the job that trains a teacher for a run."""
    return TrainArgs(
        dataset=request.dataset,
        algorithm=request.algorithm,
        task=request.task,
        hparams=json.dumps(dict(user), sort_keys=True),
        trial_seed=request.trial_seed,
        seed=request.seed,
        steps=request.steps,
        test_envs=list(request.test_envs),
        output_dir=str(folder),
        data_dir=request.data_dir,
        holdout_fraction=request.holdout_fraction,
        uda_holdout_fraction=request.uda_holdout_fraction,
        host=args.host,
        device=args.device,
        precision=args.precision,
        teachers_dir=str(folder.parent),
        image_cache=args.image_cache,
        feature_cache=args.feature_cache,
        data_seed=request.data_seed,
    )
