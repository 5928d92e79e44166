"""A data set's environments, split into the parts that are trained on, validated on and unlabelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.data.left_out import leave_out
from daft_domainbed.errors import UsageError
from daft_domainbed.host.contract import Host

NO_UNLABELLED = "--task domain_adaptation needs unlabelled images: give --uda_holdout_fraction above 0"


@dataclass(frozen=True)
class Data:
    """A data set, and the parts of its environments."""

    dataset: Any
    in_splits: list[Any]
    out_splits: list[Any]
    uda_splits: dict[int, Any]  # by environment; only those that are not empty

    def list_splits(self) -> list[tuple[Any, Any]]:
        """Return the in- and the out-split of every environment."""
        return list(zip(self.in_splits, self.out_splits, strict=True))


def build_data(host: Host, args: TrainArgs, hparams: Mapping[str, Any], dataset_class: Any) -> Data:
    """Build a data set and split every environment.

    Raises:
        UsageError: It is read from files, and they are not where they were looked for; or it has not the classes that
            are to be left out.
    """
    try:
        dataset = dataset_class(args.data_dir, list(args.test_envs), hparams)
    except (TypeError, ValueError, FileNotFoundError, RuntimeError) as error:  # upstream's do not look before they read
        says_where = "NoneType" in str(error) or "directory" in str(error).lower() or "not found" in str(error).lower()
        if args.data_dir is None:
            if not says_where:  # a mistake in a data set of the user's own
                raise
            raise UsageError(f"{args.dataset} is read from files: say where with --data_dir ({error})") from error
        if isinstance(error, TypeError | ValueError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{args.dataset} cannot be read from --data_dir {args.data_dir}: {reason}") from error
    if args.leave_out_classes:
        leave_out(dataset, args.leave_out_classes)
    return split_environments(host, args, dataset)


def split_environments(host: Host, args: TrainArgs, dataset: Any) -> Data:
    """Split every environment of a data set as DomainBed does; draws nothing from the global generators."""
    in_splits, out_splits, uda_splits = [], [], {}
    for i, env in enumerate(dataset):
        seed = host.misc.seed_hash(args.trial_seed, i)
        out, in_ = host.misc.split_dataset(env, int(len(env) * args.holdout_fraction), seed)
        if i in args.test_envs:
            uda, in_ = host.misc.split_dataset(in_, int(len(in_) * args.uda_holdout_fraction), seed)
            if len(uda):
                uda_splits[i] = _flatten(uda)
            in_ = _flatten(in_)
        in_splits.append(in_)
        out_splits.append(out)
    return Data(dataset, in_splits, out_splits, uda_splits)


def _flatten(split: Any) -> Any:
    """Turn a split of a split into one split, whose data lie where fetching and fingerprints look for them."""
    inner = split.underlying_dataset
    split.keys = [inner.keys[key] for key in split.keys]
    split.underlying_dataset = inner.underlying_dataset
    return split


def check_sizes(data: Data, args: TrainArgs, hparams: Mapping[str, Any], environments: Sequence[str]) -> None:
    """Refuse environments too small for their splits or for a batch, for which upstream would wait without end.

    Raises:
        UsageError: Names the environment, and the batch size that fits.
    """
    held_out = set(args.test_envs)
    for i, (in_, out) in enumerate(zip(data.in_splits, data.out_splits, strict=True)):
        if not len(in_) or not len(out):
            raise UsageError(
                f"env {environments[i]!r} has {len(in_) + len(out)} images, of which --holdout_fraction "
                f"{args.holdout_fraction} leaves {len(in_)} in and {len(out)} out: change the fraction or add images"
            )
    if hparams["class_balanced"]:
        return  # that loader draws each batch afresh, whatever the size of the split
    batch_size = hparams["batch_size"]
    trained = [(environments[i], split) for i, split in enumerate(data.in_splits) if i not in held_out]
    unlabelled = [("the unlabelled part of the held-out domains", split) for split in data.uda_splits.values()]
    largest = min(len(split) for _, split in trained + unlabelled)
    for name, split in trained + unlabelled:
        if len(split) < batch_size:
            raise UsageError(
                f"env {name!r} has {len(split)} training images but batch_size is {batch_size}, and DomainBed's loader "
                f"would wait without end: lower it with --hparams '{{\"batch_size\": {largest}}}'"
            )
