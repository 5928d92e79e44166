"""What a run was trained on: its provenance, with a fingerprint of every split."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset

from daft_domainbed.arguments import TrainArgs, name_dataset

# Compared in this order, so that a message names what a person set before what follows from it.
PLAIN_FIELDS = (
    "dataset",
    "test_envs",
    "trial_seed",
    "holdout_fraction",
    "task",
    "uda_holdout_fraction",
    "leave_out_classes",
    "num_classes",
    "input_shape",
)
_SAMPLES_AT_ONCE = 4096  # bounds the memory, not the result

Split = Any  # the host's split: `underlying_dataset` and `keys`


def describe(
    args: TrainArgs, num_classes: int, input_shape: Sequence[int], splits: Sequence[tuple[Split, Split]]
) -> dict[str, Any]:
    """Return a run's provenance: what was asked for, and a fingerprint of every split that came of it."""
    return {
        "dataset": name_dataset(args.dataset),
        "test_envs": sorted(args.test_envs),
        "trial_seed": args.trial_seed,
        "holdout_fraction": args.holdout_fraction,
        "task": args.task,
        "uda_holdout_fraction": args.uda_holdout_fraction,
        "leave_out_classes": args.leave_out_classes,
        "num_classes": num_classes,
        "input_shape": list(input_shape),
        "fingerprints": {
            f"env{i}_{part}": fingerprint(split)
            for i, pair in enumerate(splits)
            for part, split in zip(("in", "out"), pair, strict=True)
        },
    }


def compare(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each field in which a teacher's provenance differs from the run's, plain fields first.

    The fingerprints of another data set all differ, which says nothing more, so they are left out. A folder of images
    may have another name by now: its fingerprints tell.
    """
    if str(theirs.get("dataset")).startswith("folder:") and theirs.get("fingerprints") == ours["fingerprints"]:
        theirs = {**theirs, "dataset": ours["dataset"]}
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
            digest.update(f"{_identify(data, key)}\n".encode(errors="surrogateescape"))
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
