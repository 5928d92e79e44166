"""What a run was trained on: the facts that an Algorithm is never told, and without which no teacher can be trusted."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import ConcatDataset

from daft_domainbed.attacks import InputSpec

if TYPE_CHECKING:
    from daft_domainbed.plugin import Host

# Compared in this order, so that a message names what a person set before what follows from it.
PLAIN_FIELDS = (
    "dataset",
    "test_envs",
    "trial_seed",
    "holdout_fraction",
    "task",
    "uda_holdout_fraction",
    "num_classes",
    "input_shape",
)
_SAMPLES_AT_ONCE = 4096  # bounds the memory, not the result

Split = Any  # the host's split: `underlying_dataset` and `keys`


@dataclass(frozen=True)
class Request:
    """The arguments of a training run, in the host's own names."""

    dataset: str
    algorithm: str
    test_envs: tuple[int, ...]
    trial_seed: int
    seed: int
    holdout_fraction: float
    task: str
    uda_holdout_fraction: float
    steps: int
    data_dir: str | None = None
    data_seed: int | None = None  # what the data set is built under, where it is not `seed`


@dataclass(frozen=True)
class RunFacts:
    """Everything about the run in progress that a teacher has to agree with, or needs to be made.

    Attributes:
        request: The run's arguments.
        user_hparams: What the user gave in `--hparams`, unresolved.
        num_classes: Number of classes.
        input_shape: (C, H, W).
        input_spec: How images were normalised.
        splits: In- and out-split of every environment, in order.
        host: The host whose parts the run uses.
        output_dir: The run's folder; teacher paths are recorded relative to it.
        teachers_dir: The store of teachers.
        train: Trains a model as the run's own loop would: (request, hparams, folder) -> None.
        rebuild: Returns the provenance that another run's recorded arguments imply on this data set: (args) -> dict.
        announce: Told what there is to record of the teacher that was found.
        precision: Of the run's arithmetic; part of how a teacher is made.
    """

    request: Request
    user_hparams: Mapping[str, Any]
    num_classes: int
    input_shape: tuple[int, ...]
    input_spec: InputSpec
    splits: Sequence[tuple[Split, Split]] = field(repr=False)
    host: Host = field(repr=False)
    output_dir: Path
    teachers_dir: Path
    train: Callable[[Request, dict[str, Any], Path], None] = field(repr=False)
    rebuild: Callable[[Mapping[str, Any]], dict[str, Any]] = field(repr=False)
    announce: Callable[[dict[str, Any]], None] = field(default=lambda teacher: None, repr=False)
    precision: str = "fp32"

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """The run's provenance, of plain types, as a checkpoint stores it."""
        return describe(self.request, self.num_classes, self.input_shape, self.splits)


_current: list[RunFacts] = []


@contextmanager
def run_in_progress(facts: RunFacts) -> Iterator[None]:
    """Make the facts known to the algorithms that are built inside; runs may nest (a teacher's inside a student's)."""
    _current.append(facts)
    try:
        yield
    finally:
        _current.pop()


def set_run_facts(facts: RunFacts) -> None:
    """Make the facts known for the rest of the process, which is one run of upstream's own loop."""
    _current[:] = [facts]


def get_run_facts() -> RunFacts | None:
    """Return the facts of the innermost run in progress, or None."""
    return _current[-1] if _current else None


def describe(
    request: Request, num_classes: int, input_shape: Sequence[int], splits: Sequence[tuple[Split, Split]]
) -> dict[str, Any]:
    """Return a run's provenance: what was asked for, and a fingerprint of every split that came of it."""
    return {
        "dataset": name_dataset(request.dataset),
        "test_envs": sorted(request.test_envs),
        "trial_seed": request.trial_seed,
        "holdout_fraction": request.holdout_fraction,
        "task": request.task,
        "uda_holdout_fraction": request.uda_holdout_fraction,
        "num_classes": num_classes,
        "input_shape": list(input_shape),
        "fingerprints": {
            f"env{i}_{part}": fingerprint(split)
            for i, pair in enumerate(splits)
            for part, split in zip(("in", "out"), pair, strict=True)
        },
    }


def name_dataset(dataset: str) -> str:
    """Return a data set's name without the place where it lies: a moved folder is the same data.

    Example:
        >>> name_dataset("folder:/data/birds/")
        'folder:birds'
    """
    return (
        f"folder:{Path(dataset.removeprefix('folder:')).resolve().name}" if dataset.startswith("folder:") else dataset
    )


def compare(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each field in which a teacher's provenance differs from the run's, plain fields first.

    The fingerprints of another data set all differ, which says nothing more, so they are left out.
    """
    differences = [
        f"{name} is {theirs.get(name)} there and {ours[name]} here"
        for name in PLAIN_FIELDS
        if theirs.get(name) != ours[name]
    ]
    if theirs.get("dataset") != ours["dataset"]:
        return differences
    prints = theirs.get("fingerprints") or {}
    for name, value in ours["fingerprints"].items():
        if prints.get(name) != value:
            there = str(prints.get(name))[:12]
            differences.append(f"the data of {name} have fingerprint {there} there and {value[:12]} here")
    return differences


def fingerprint(split: Split) -> str:
    """Return a SHA-256 of a split, in its order.

    Tensors count with the bytes that the data set serves, files with names, sizes and classes, anything else with the
    indices and the length of the data set they point into.
    """
    data, keys = split.underlying_dataset, [int(key) for key in split.keys]
    digest = hashlib.sha256()
    if hasattr(data, "raw") or hasattr(data, "tensors"):
        all_labels = []
        for start in range(0, len(keys), _SAMPLES_AT_ONCE):
            indices = torch.tensor(keys[start : start + _SAMPLES_AT_ONCE], dtype=torch.int64)
            images, labels = data.raw(indices) if hasattr(data, "raw") else (tensor[indices] for tensor in data.tensors)
            digest.update(images.contiguous().numpy().tobytes())
            all_labels += labels.tolist()
        digest.update(torch.tensor(all_labels, dtype=torch.int64).numpy().tobytes())
    else:
        for key in keys:
            digest.update(f"{_identify(data, key)}\n".encode())
    return digest.hexdigest()


def _identify(data: Any, key: int) -> str:
    """Say which sample a key stands for, without reading it."""
    if hasattr(data, "samples"):
        path, label = data.samples[key]
        return f"{Path(path).relative_to(Path(data.root)).as_posix()} {Path(path).stat().st_size} {label}"
    if isinstance(data, ConcatDataset):  # Spawrious' domains, put together from folders
        part = bisect_right(data.cumulative_sizes, key)
        return _identify(data.datasets[part], key - [0, *data.cumulative_sizes][part])
    if hasattr(data, "image_paths"):  # one such folder, in whatever order the disk lists it
        path = Path(data.image_paths[key])
        return f"{'/'.join(path.parts[-4:])} {path.stat().st_size} {data.class_index}"
    if hasattr(data, "indices") and hasattr(data, "dataset"):  # WILDS' domains
        return _identify(data.dataset, int(data.indices[key]))
    label = f" {int(data.y_array[key])}" if hasattr(data, "y_array") else ""
    return f"{type(data).__name__} {len(data)} {key}{label}"
