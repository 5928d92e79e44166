"""A data set's environments, split into the parts that are trained on, validated on and unlabelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.data.left_out import leave_out
from daft_domainbed.embedded.image_folder import identify
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

    @property
    def lengths(self) -> list[int]:
        """Number of images of every environment."""
        return [len(env) for env in self.dataset]

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
    if args.data_id is not None and (found := identify(dataset)) != args.data_id:
        raise UsageError(
            f"{args.data_path or args.dataset} holds other files than this run is of ({found[:12]} here and "
            f"{args.data_id[:12]} there): bring them back, or choose another --output_dir"
        )
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


@dataclass(frozen=True)
class Sizes:
    """How many images a run has, known from its arguments before anything is split.

    Attributes:
        parts: Images in the in- and the out-split of each environment.
        sources: What batches are drawn from, by name: in-splits of training domains, and unlabelled parts.
    """

    parts: dict[str, tuple[int, int]]
    sources: dict[str, int]

    @property
    def largest_batch(self) -> int:
        """The largest batch that every source can serve."""
        return min(self.sources.values())


def count_images(lengths: Sequence[int], args: TrainArgs, environments: Sequence[str]) -> Sizes:
    """Count the images of a run.

    Args:
        lengths: Images of each environment.
        args: Of the run.
        environments: Names.
    """
    parts, sources = {}, {}
    for i, (name, length) in enumerate(zip(environments, lengths, strict=True)):
        n_out = int(length * args.holdout_fraction)
        parts[name] = (length - n_out, n_out)
        n_unlabelled = int((length - n_out) * args.uda_holdout_fraction)
        if i not in args.test_envs:
            sources[name] = length - n_out
        elif n_unlabelled:
            sources[f"{name}, unlabelled part"] = n_unlabelled
    return Sizes(parts, sources)


def check_sizes(sizes: Sizes, args: TrainArgs, hparams: Mapping[str, Any]) -> None:
    """Refuse environments too small for their splits or for a batch, for which upstream would wait without end.

    Raises:
        UsageError: Names the environment, and the batch size that fits.
    """
    for name, (n_in, n_out) in sizes.parts.items():
        if not n_in or not n_out:
            raise UsageError(
                f"env {name!r} has {n_in + n_out} images, of which --holdout_fraction "
                f"{args.holdout_fraction} leaves {n_in} in and {n_out} out: change the fraction or add images"
            )
    batch_size = cap_batch_size(sizes, args, hparams)
    for name, size in sizes.sources.items():
        if size < batch_size and not hparams["class_balanced"]:  # that loader draws each batch afresh
            draw = f" (hparams_seed {args.hparams_seed} of {args.algorithm})" if args.hparams_seed else ""
            raise UsageError(
                f"env {name!r} has {size} training images but batch_size is {batch_size}{draw}, and DomainBed's loader "
                f"would wait without end: lower it with --hparams '{{\"batch_size\": {sizes.largest_batch}}}', or add "
                "--cap_batch_size"
            )


def cap_batch_size(sizes: Sizes, args: TrainArgs, hparams: Mapping[str, Any]) -> int:
    """Return the batch size of a run: with `--cap_batch_size` no larger than its smallest source of batches."""
    asked: int = hparams["batch_size"]
    return min(asked, sizes.largest_batch) if args.cap_batch_size else asked
