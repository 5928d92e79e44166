"""Images of none of a model's classes, which it should not be sure about, from wherever they come."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from torchvision.transforms.functional import to_tensor

from daft_domainbed.data.left_out import find_places, list_classes
from daft_domainbed.embedded.datasets import read_image
from daft_domainbed.embedded.image_folder import Found, walk_images
from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.subject import Subject
from daft_domainbed.functional.input_spec import InputSpec
from daft_domainbed.host.contract import describe_dataset
from daft_domainbed.runtime.randomness import preserve_states, seed_everything
from daft_domainbed.teachers import provenance

_AT_ONCE = 32


@dataclass(frozen=True)
class Outside:
    """A set of images from outside.

    Attributes:
        name: As in the json: without the place where it lies.
        size: Number of images.
        take: Maps places, ascending, and a generator to pixels, [B, C, H, W], of any size and number of channels.
        fingerprint: Tells sets of one name apart: of names and sizes where they are files; empty for noise.
    """

    name: str
    size: int
    take: Callable[[Sequence[int], torch.Generator], Tensor]
    fingerprint: str = ""

    def load(self, subject: Subject, n: int, seed: int) -> Iterator[Tensor]:
        """Yield at most n images, chosen by a seed, as pixels of the size and channels that a model takes."""
        generator = torch.Generator().manual_seed(subject.host.misc.seed_hash("outside", seed, self.name))
        places = sorted(torch.randperm(self.size, generator=generator)[:n].tolist())
        for start in range(0, len(places), _AT_ONCE):
            pixels = self.take(places[start : start + _AT_ONCE], generator)
            yield fit(pixels, subject.data.dataset.input_shape).to(subject.model.device)


def name_outside(text: str) -> str:
    """Return the name of a set, which does not say where it lies.

    Example:
        >>> name_outside("folder:/data/textures"), name_outside("noise")
        ('folder:textures', 'noise')
    """
    place = text.removeprefix("folder:")
    return text if place == text else f"folder:{Path(place).expanduser().resolve().name}"


def find_outside(text: str, subject: Subject, data_dir: str | None, envs: Sequence[int] | None = None) -> Outside:
    """Return the set that `--ood` or `--strong_ood` names: noise, folder:PATH, classes:A,B, or a data set of the host.

    Args:
        text: The set, as it was given.
        subject: The model that it is shown to.
        data_dir: Where data sets lie; where the model's own lies, unless given.
        envs: The domains whose images of left-out classes count; all held-out ones, unless given.

    Raises:
        UsageError: There is no such set, or it shows classes that the model knows.
    """
    if text == "noise":
        shape = tuple(subject.data.dataset.input_shape)
        return Outside("noise", 10**6, lambda places, generator: torch.rand((len(places), *shape), generator=generator))
    if text.startswith("classes:"):
        return _find_left_out(text.removeprefix("classes:").split(","), subject, envs or subject.held_out)
    if text.startswith("folder:"):
        return _find_folder(Path(text.removeprefix("folder:")).expanduser(), subject)
    return _find_dataset(text, subject, data_dir)


def fit(pixels: Tensor, shape: Sequence[int]) -> Tensor:
    """Return images [B, C, H, W] in another shape (C, H, W): resized bilinearly, grey or in equal channels.

    Raises:
        UsageError: Nothing says what a channel would hold.
    """
    channels, height, width = shape
    if pixels.shape[1] != channels:
        if pixels.shape[1] not in (1, 3) or channels not in (1, 3):
            raise UsageError(
                f"images of {pixels.shape[1]} channels cannot be shown to a model of {channels}: use noise"
            )
        gray = pixels.mean(1, keepdim=True)
        pixels = gray if channels == 1 else gray.expand(-1, 3, -1, -1)
    if pixels.shape[2:] != (height, width):
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return pixels.clamp(0, 1)


def _find_folder(folder: Path, subject: Subject) -> Outside:
    if not folder.is_dir():
        raise UsageError(f"outside images folder:{folder}: there is no such folder")
    paths = sorted(map(Path, walk_images(folder, Found(), Image.registered_extensions())))
    if not paths:
        raise UsageError(f"outside images folder:{folder}: there is no image in it")
    inside = {part for path in paths for part in path.relative_to(folder).parts[:-1]}
    _refuse_known(f"folder:{folder}", inside | {folder.resolve().name}, subject)
    shape = tuple(subject.data.dataset.input_shape)

    def take(places: Sequence[int], generator: torch.Generator) -> Tensor:
        # Pictures differ in size: each is brought to the model's before they are put together.
        images = [to_tensor(read_image(str(paths[place]), False)) for place in places]
        return torch.cat([fit(image[None], shape) for image in images])

    digest = hashlib.sha256()
    for path in paths:
        line = f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return Outside(name_outside(f"folder:{folder}"), len(paths), take, digest.hexdigest())


def _find_dataset(name: str, subject: Subject, data_dir: str | None) -> Outside:
    if name == subject.dataset:
        raise UsageError(f"outside images {name} is the data set that the model was trained on: name another one")
    try:
        facts = describe_dataset(subject.host, name, {})
    except UsageError as error:
        raise UsageError(
            f"outside images {name}: {error}; it takes noise, folder:PATH, classes:A,B, or a data set"
        ) from error
    hparams = dict(subject.content["model_hparams"]) | {"data_augmentation": False}
    with preserve_states():
        seed_everything(0)
        dataset = facts.dataset_class(data_dir or subject.args.get("data_dir"), [], hparams)
    _refuse_known(name, list_shown(dataset), subject)
    places = [(dataset[i], range(len(dataset[i]))) for i in range(len(dataset))]
    return _make_outside(name, places, facts.input_spec)


def _find_left_out(names: list[str], subject: Subject, envs: Sequence[int]) -> Outside:
    """Return some domains' images of the classes that were left out of training."""
    left_out = subject.run.leave_out_classes or []
    if known := [name for name in names if name not in left_out]:
        raise UsageError(
            f"outside images classes:{','.join(names)}: {', '.join(known)} was not left out of the training of "
            f"{subject.path}, which left out {', '.join(left_out) or 'nothing'}: train with --leave_out_classes"
        )
    dataset = build_whole(subject)
    labels = [list_classes(dataset).index(name) for name in names]
    places = [(dataset[i], find_places(dataset[i], labels)) for i in envs]
    return _make_outside(f"classes:{','.join(names)}", places, subject.model.spec)


def build_whole(subject: Subject) -> Any:
    """Build a subject's data set with all its classes."""
    run = subject.run
    facts = describe_dataset(subject.host, run.dataset, subject.content["model_hparams"], run.data_path)
    hparams = {**subject.content["model_hparams"], "data_augmentation": False}
    with preserve_states():
        seed_everything(run.seed if run.data_seed is None else run.data_seed)
        return facts.dataset_class(run.data_dir, list(run.test_envs), hparams)


def _make_outside(name: str, parts: Sequence[tuple[Any, Sequence[int]]], spec: InputSpec) -> Outside:
    """Return the set of the images at some places of some data sets."""
    images: ConcatDataset[Any] = ConcatDataset([Subset(data, places) for data, places in parts])
    digest = hashlib.sha256()
    for data, places in parts:
        digest.update(provenance.fingerprint(SimpleNamespace(underlying_dataset=data, keys=places)).encode())

    def take(places: Sequence[int], generator: torch.Generator) -> Tensor:
        x = torch.stack([images[place][0] for place in places])
        return x * spec.get_std(x) + spec.get_mean(x)

    return Outside(name, len(images), take, digest.hexdigest())


def _refuse_known(name: str, shown: Iterable[str], subject: Subject) -> None:
    known = {text.lower() for text in list_shown(subject.data.dataset)}
    if both := sorted({text for text in shown if text.lower() in known}):
        raise UsageError(
            f"outside images {name} shows classes that the model knows ({', '.join(both)}): name a set without them"
        )


def list_shown(dataset: Any) -> list[str]:
    """Return what the images of a data set show, as far as it has names; digits are digits whatever they are called."""
    ancestors = {ancestor.__name__ for ancestor in type(dataset).__mro__}
    if ancestors & {"DealtDigits", "MultipleEnvironmentMNIST"}:
        return ["handwritten digits"]
    names = list_classes(dataset)
    return [] if all(name.isdigit() for name in names) else names
