"""The arguments of a run and of a sweep, and which of them make it the run or the sweep that it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from daft_domainbed.hparams import parse_json


@dataclass(frozen=True, kw_only=True)
class SharedArgs:
    """What a run and a whole sweep have in common.

    Attributes:
        leave_out_classes: Names of the classes that no environment shows, and for which the model has no output.
        cap_batch_size: Whether a batch that a domain cannot fill is made smaller.
        teachers_dir: The store of teachers; None is `teachers/` beside the run's folder, in a sweep's folder.
        image_cache: A folder for decoded images; None decodes each image whenever it is read.
        feature_cache: A folder for the features of frozen backbones; None keeps them for the run.
        log: Programs that follow the run, "tensorboard" or "wandb"; its records are the same with and without.
    """

    task: str = "domain_generalization"
    hparams: str | None = None
    steps: int | None = None
    checkpoint_freq: int | None = None
    data_dir: str | None = None
    holdout_fraction: float = 0.2
    uda_holdout_fraction: float = 0.0
    leave_out_classes: list[str] | None = None
    cap_batch_size: bool = False
    skip_model_save: bool = False
    host: str = "embedded"
    device: str = "auto"
    precision: str = "fp32"
    teachers_dir: str | None = None
    image_cache: str | None = None
    feature_cache: str | None = None
    log: list[str] | None = None


@dataclass(frozen=True)
class TrainArgs(SharedArgs):
    """The arguments of one training run: DomainBed's flags, and ours.

    Attributes:
        data_seed: What the data set is built under where it is not `seed`: a teacher's data are its student's.
        data_id: By which files a folder of images is known; None, as in older runs, by its name alone.
        data_path: Where that folder lies, absolute; None is where `dataset` says.
    """

    dataset: str = "RotatedMNIST"
    algorithm: str = "ERM"
    hparams_seed: int = 0
    trial_seed: int = 0
    seed: int = 0
    test_envs: list[int] = field(default_factory=lambda: [0])
    output_dir: str = "train_output"
    save_model_every_checkpoint: bool = False
    data_seed: int | None = None
    data_id: str | None = None
    data_path: str | None = None


@dataclass(frozen=True)
class SweepArgs(SharedArgs):
    """The arguments of a sweep: DomainBed's sweep flags, and those that every run of it shares.

    Attributes:
        n_checkpoints: Evaluations of a run after its first step, from which the interval follows.
        test_envs: Words, each a set of held-out domains, commas between them, by number or name; None is each domain
            alone and, unless told otherwise, each pair.
        single_source: Whether each domain in turn is the only one to train on.
        chosen: Settings that another sweep chose, and which (`launch/rerun.py`); the students have them.
        data: `data_id` and `data_path` of the folders of images among the data sets, by name.
    """

    datasets: list[str]
    algorithms: list[str]
    output_dir: str
    n_trials: int = 3
    n_trials_from: int = 0
    n_hparams: int = 20
    n_hparams_from: int = 0
    seed: int = 0
    single_test_envs: bool = False
    test_envs: list[str] | None = None
    single_source: bool = False
    threads: int = 1
    n_checkpoints: int | None = None
    chosen: dict[str, Any] | None = None
    data: dict[str, dict[str, str | None]] = field(default_factory=dict)


# Where a run or a sweep lies, where its data and teachers lie (what they hold is verified) and on what it runs may
# change between two starts.
PLACES = ("data_dir", "teachers_dir", "image_cache", "feature_cache", "device")
MOVABLE = ("output_dir", "log", "data_id", "data_path", "data", *PLACES)

# The arguments that names of folders and teachers have been made of from the beginning. Later ones count only where
# they are not at their defaults, so that what was begun before them goes on.
_FIRST = {
    "dataset", "algorithm", "task", "hparams", "hparams_seed", "trial_seed", "seed", "steps", "checkpoint_freq",
    "test_envs", "holdout_fraction", "uda_holdout_fraction", "skip_model_save", "save_model_every_checkpoint", "host",
    "precision", "data_seed", "datasets", "algorithms", "n_trials", "n_trials_from", "n_hparams", "n_hparams_from",
    "single_test_envs", "threads",
}  # fmt: skip


def get_identity(args: SharedArgs) -> dict[str, Any]:
    """Return the arguments that make a run or a sweep another one.

    Example:
        >>> "device" in get_identity(TrainArgs(device="cpu"))
        False
    """
    values = {item.name: getattr(args, item.name) for item in fields(args) if item.name not in MOVABLE}
    defaults = get_defaults(type(args))
    return {name: value for name, value in values.items() if name in _FIRST or value != defaults.get(name)}


def get_defaults(kind: type[SharedArgs]) -> dict[str, Any]:
    """Return the defaults of a kind of arguments."""
    return {
        item.name: item.default if item.default_factory is MISSING else item.default_factory()
        for item in fields(kind)
        if (item.default, item.default_factory) != (MISSING, MISSING)
    }


def list_differences(stored: Mapping[str, Any], args: SharedArgs, *, ignored: tuple[str, ...] = ()) -> list[str]:
    """Return one phrase for each argument in which what was begun differs from what is asked for now.

    Args:
        stored: The arguments that it was begun with; those that did not exist then had their defaults.
        args: Those of now.
        ignored: Names that do not count beside the movable ones.
    """
    defaults = get_defaults(type(args))
    if is_same_data(defaults | dict(stored), vars(args)):
        ignored = ("dataset", *ignored)
    has_files = stored.get("data_id") is not None
    pairs = {
        item.name: (stored.get(item.name, defaults.get(item.name)), getattr(args, item.name))
        for item in fields(args)
        if item.name not in (*MOVABLE, *ignored)
    }
    return [
        _phrase(name, there, here, has_files=has_files)
        for name, (there, here) in pairs.items()
        if name == "dataset" or _normalise(name, there) != _normalise(name, here)
    ]


def _phrase(name: str, there: Any, here: Any, *, has_files: bool) -> str:
    if name == "chosen":
        return "other settings were chosen"
    return f"{name} is {there} there and {here} here" + (
        ", with other files" if name == "dataset" and has_files else ""
    )


def is_same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether the arguments of two runs name the same data: by their files, or by name where nobody knows them.

    Example:
        >>> birds = {"dataset": "folder:a/birds", "data_id": "12"}
        >>> is_same_data(birds, {"dataset": "folder:fowl", "data_id": "12"})
        True
        >>> is_same_data(birds, {"dataset": "folder:b/birds", "data_id": "34"})
        False
        >>> is_same_data(birds, {"dataset": "folder:b/birds"})
        True
    """
    ids = one.get("data_id"), other.get("data_id")
    if None not in ids:
        return ids[0] == ids[1]
    names = one.get("dataset"), other.get("dataset")
    return names[0] == names[1] or (
        isinstance(names[0], str) and isinstance(names[1], str) and name_dataset(names[0]) == name_dataset(names[1])
    )


def _normalise(name: str, value: Any) -> Any:
    if name == "chosen" and isinstance(value, dict):
        return value["settings"]  # the sweep that they come from may have moved
    return _forget_first_network(parse_json(value)) if name == "hparams" else value


def _forget_first_network(hparams: dict[str, Any]) -> dict[str, Any]:
    """Return hyperparameters without what a plan of before gives to a student so that it keeps its network."""
    first = {"backbone": "default"}
    return {name: value for name, value in hparams.items() if value != first}


def name_dataset(dataset: str) -> str:
    """Return a data set's name without the place where it lies: a moved folder is the same data.

    Example:
        >>> name_dataset("folder:/data/birds/")
        'folder:birds'
    """
    return (
        f"folder:{Path(dataset.removeprefix('folder:')).resolve().name}" if dataset.startswith("folder:") else dataset
    )


def find_data_path(args: Mapping[str, Any], data_dir: str | None = None) -> str | None:
    """Return where the folder of a run's images lies now; None is where its name says, or that there is none.

    Args:
        args: Of the run.
        data_dir: Where the user says that the data lie now: the folder, or the one that holds it.
    """
    if not args["dataset"].startswith("folder:"):
        return None
    if data_dir is not None:
        inside = Path(data_dir, name_dataset(args["dataset"]).removeprefix("folder:"))
        return os.path.abspath(inside if inside.is_dir() else data_dir)
    recorded = args.get("data_path")
    return recorded if isinstance(recorded, str) and os.path.isdir(recorded) else None
