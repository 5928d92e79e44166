"""What is judged: a checkpoint with its data, and the examples that every figure rests on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from daft_domainbed.arguments import TrainArgs, find_data_path, name_dataset
from daft_domainbed.data.place import identify
from daft_domainbed.data.splits import Data, build_data
from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.pixel_model import PixelModel
from daft_domainbed.host.checkpoints import load_checkpoint
from daft_domainbed.host.contract import Host, describe_dataset, find_host
from daft_domainbed.methods import PLAIN
from daft_domainbed.models.weights import find_non_finite, hash_state
from daft_domainbed.plugin.registration import register
from daft_domainbed.runtime.layout import PROVENANCE_FILE
from daft_domainbed.runtime.randomness import preserve_states, seed_everything
from daft_domainbed.teachers import provenance
from daft_domainbed.teachers.rebuild import rebuild_model

SMALL = 64  # pixels: up to here images are small


@dataclass
class Subject:
    """A checkpoint with its data.

    Attributes:
        name: Unique among the checkpoints that are judged together.
        given: The checkpoint, as it was given.
        content: Of the file.
        host: Whose parts are used.
        model: Maps pixels to logits.
        data: The data set, not augmented, and its splits.
        environments: Names.
        n_classes: Number of classes.
        weights: A hash of the model's.
        run: The arguments on which its data depend.
    """

    name: str
    given: str
    content: Mapping[str, Any]
    host: Host
    model: PixelModel
    data: Data
    environments: list[str]
    n_classes: int
    weights: str
    run: TrainArgs

    @property
    def path(self) -> Path:
        """Of the checkpoint."""
        return Path(self.given)

    @property
    def args(self) -> Mapping[str, Any]:
        """The arguments of the run that made it."""
        return self.content["args"]

    @property
    def algorithm(self) -> str:
        """The algorithm's name."""
        return str(self.args.get("algorithm", PLAIN))

    @property
    def dataset(self) -> str:
        """The data set's name, without the place where it lies."""
        return name_dataset(self.args["dataset"])

    @property
    def held_out(self) -> list[int]:
        """The environments that were held out of training."""
        return sorted(self.run.test_envs)

    @property
    def is_small(self) -> bool:
        """Whether its images have at most 64 pixels a side."""
        return max(self.data.dataset.input_shape[1:]) <= SMALL

    @property
    def batch_size(self) -> int:
        """How many examples are asked about at a time; their memory may hold fewer."""
        return 256 if self.is_small else 32

    @property
    def has_box(self) -> bool:
        """Whether its images are images, whose pixels lie between 0 and 1."""
        return self.model.spec.has_box

    def choose(self, n: int, seed: int) -> dict[str, list[int]]:
        """Choose examples: of held-out domains' in-splits, of training domains' out-splits.

        Args:
            n: As many of an environment at most; 0 is all.
            seed: Of the draw.

        Returns:
            Positions in each environment's data set, ascending.
        """
        chosen = {}
        for i, name in enumerate(self.environments):
            keys = (self.data.in_splits if i in self.held_out else self.data.out_splits)[i].keys
            if not len(keys):
                raise UsageError(f"{self.path}: env {name!r} has no examples to judge it by")
            generator = torch.Generator().manual_seed(self.host.misc.seed_hash("examples", seed, i))
            order = torch.randperm(len(keys), generator=generator)[: n or None]
            chosen[name] = sorted(int(keys[place]) for place in order.tolist())
        return chosen

    def load(self, env: str, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Return pixels, [B, C, H, W], and labels, [B], of some examples of an environment, on the model's device."""
        data = self.data.dataset[self.environments.index(env)]
        x, y = default_collate([data[position] for position in positions])
        return self.to_pixels(x), y.to(self.model.device)

    def to_pixels(self, x: Tensor) -> Tensor:
        """Return the pixels of images as the data set serves them, on the model's device."""
        spec, x = self.model.spec, x.to(self.model.device)
        if not self.model.is_plain:
            x = x * spec.get_std(x) + spec.get_mean(x)
        return x.clamp(0, 1) if spec.has_box else x

    def list_batches(self, positions: list[int]) -> Iterator[list[int]]:
        """Yield positions batch by batch, of a size that depends on the images alone: no machine rounds otherwise."""
        for start in range(0, len(positions), self.batch_size):
            yield positions[start : start + self.batch_size]

    def fingerprint(self, chosen: Mapping[str, list[int]]) -> dict[str, str]:
        """Return a hash of each environment's chosen examples."""
        split_class = type(self.data.in_splits[0])
        return {
            name: provenance.fingerprint(split_class(self.data.dataset[i], chosen[name]))
            for i, name in enumerate(self.environments)
        }


def load_subject(
    path: Path | str, name: str, *, device: torch.device, data_dir: str | None = None, host: str | None = None
) -> Subject:
    """Load a checkpoint and its data.

    Args:
        path: Of a `model.pkl`, ours or DomainBed's own.
        name: Unique among the checkpoints that are judged together.
        device: Where the model computes.
        data_dir: Where the data lie now; where they lay in training, unless given.
        host: Whose parts are used; those that trained it, unless given.

    Raises:
        UsageError: The checkpoint is none, or does not say on what it was trained, or the data are not there, or are
            not those that it was trained on.
    """
    try:
        return _load(str(path), name, device, data_dir, host)
    except UsageError as error:
        raise error if str(Path(path)) in str(error) else UsageError(f"{path}: {error}") from error


def _load(given: str, name: str, device: torch.device, data_dir: str | None, host: str | None) -> Subject:
    path = Path(given)
    content = load_checkpoint(path)
    its_host = find_host(host or content["args"].get("host") or "embedded")
    register(its_host)
    args = _read_args(content["args"], path, data_dir)
    facts = describe_dataset(its_host, args.dataset, content["model_hparams"], args.data_path)
    if facts.has_texts:
        raise UsageError(f"{path} ranks the texts of {args.dataset}: only models of images are judged and adapted")
    with preserve_states():
        seed_everything(args.seed if args.data_seed is None else args.data_seed)
        data = _build_data(its_host, args, content["model_hparams"], facts.dataset_class, path)
        algorithm = load_algorithm(content, path, its_host)
    _check_data(content, path, data, args)
    if isinstance(note := content.get("adapted"), dict):
        print(
            f"{path} was adapted to environment {note.get('test_env')} by {note.get('method')}: it has seen that "
            "domain, and its head does not know the features that moved",
            file=sys.stderr,
        )
    return Subject(
        name=name,
        given=given,
        content=content,
        host=its_host,
        model=PixelModel(algorithm, facts.input_spec, device),
        data=data,
        environments=list(facts.environments),
        n_classes=content["model_num_classes"],
        weights=hash_state(algorithm.state_dict()),
        run=args,
    )


def load_algorithm(content: Mapping[str, Any], path: Path, host: Host) -> Any:
    """Return a checkpoint's algorithm, to be asked and not to be trained.

    Raises:
        UsageError: The weights do not fit, or are no numbers.
    """
    # Memories of frozen backbones' features would only be filled with images that never come again.
    hparams = {**content["model_hparams"]} | (
        {"backbone_frozen": False} if "backbone" in content["model_hparams"] else {}
    )
    algorithm = rebuild_model({**content, "model_hparams": hparams}, path, host)
    if bad := find_non_finite(algorithm.state_dict()):
        raise UsageError(f"{path}: the weights {bad} are not finite: its training diverged, train it again")
    return algorithm


def _read_args(args: Mapping[str, Any], path: Path, data_dir: str | None) -> TrainArgs:
    """Return the arguments on which data and splits depend, read from a checkpoint of whatever age."""
    missing = [name for name in ("dataset", "test_envs", "trial_seed", "seed", "holdout_fraction") if name not in args]
    if missing:
        raise UsageError(f"{path} does not say what it was trained on: its args lack {', '.join(missing)}")
    try:
        return TrainArgs(
            dataset=args["dataset"],
            data_path=find_data_path(args, data_dir),
            algorithm=str(args.get("algorithm", PLAIN)),
            test_envs=[int(env) for env in args["test_envs"]],
            trial_seed=int(args["trial_seed"]),
            seed=int(args["seed"]),
            holdout_fraction=float(args["holdout_fraction"]),
            task=str(args.get("task", "domain_generalization")),
            uda_holdout_fraction=float(args.get("uda_holdout_fraction", 0.0)),
            data_dir=data_dir or args.get("data_dir"),
            data_seed=args.get("data_seed"),
            leave_out_classes=_read_left_out(args.get("leave_out_classes")),
        )
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f"{path} does not say readably what it was trained on ({error})") from error


def _read_left_out(value: Any) -> list[str] | None:
    if value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return value
    raise ValueError(f"leave_out_classes is {value!r}")


def _build_data(host: Host, args: TrainArgs, hparams: Mapping[str, Any], dataset_class: Any, path: Path) -> Data:
    """Build the data set without augmentation, and split it as in training."""
    try:
        return build_data(host, args, {**hparams, "data_augmentation": False}, dataset_class)
    except (AssertionError, ValueError) as error:
        raise UsageError(f"{path}: {args.dataset} cannot be split as its args say ({error})") from error


def _check_data(content: Mapping[str, Any], path: Path, data: Data, args: TrainArgs) -> None:
    """Refuse data that are not those the checkpoint was trained on."""
    for what, own, its in (
        ("images of shape", list(content["model_input_shape"]), list(data.dataset.input_shape)),
        ("classes:", content["model_num_classes"], data.dataset.num_classes),
    ):
        if own != its:
            raise UsageError(
                f"{path} was trained on {what} {own}, and {args.dataset} has {its} here: name its data with --data_dir"
            )
    if beyond := [env for env in args.test_envs if not 0 <= env < len(data.in_splits)]:
        raise UsageError(f"{path} held out environment {beyond[0]}, and {args.dataset} has {len(data.in_splits)}")
    theirs = _read_provenance(content, path)
    if theirs is None:  # an old checkpoint, or one of upstream's own loop
        return
    if "declared" in theirs:  # an adopted one, of which no split is known
        if (
            theirs.get("data_id")
            and identify(f"folder:{args.data_path}" if args.data_path else args.dataset) != theirs["data_id"]
        ):
            raise UsageError(
                f"{path} was adopted for {args.dataset}, which has other files here: adopt its weights for these"
            )
        return
    own = provenance.describe(args, data.dataset.num_classes, data.dataset.input_shape, data.list_splits())
    if differences := provenance.compare(theirs, own):
        raise UsageError(
            f"{path} was trained on other data than lie here ({'; '.join(differences)[:300]}): bring them back, or "
            "name them with --data_dir"
        )


def _read_provenance(content: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Return what a checkpoint, or the file beside it, says of its data; None where neither says anything."""
    own = content.get("provenance")
    beside = path.parent / PROVENANCE_FILE
    if own is None and beside.is_file():
        try:
            own = json.loads(beside.read_text())
        except ValueError as error:
            raise UsageError(f"{beside} is not JSON ({error}): delete it") from error
    return own if isinstance(own, dict) else None
