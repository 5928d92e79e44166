"""Data sets of several domains by name; those of image files, in the published sets and in any folder."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, ImageFile
from torchvision import transforms
from torchvision.datasets import ImageFolder

from daft_domainbed.embedded.documents import DocRanking
from daft_domainbed.embedded.domains import MultipleDomainDataset
from daft_domainbed.embedded.in_memory import (
    ColoredDigits,
    ColoredMNIST,
    Debug28,
    Debug224,
    EmojiStyles,
    EmojiStylesUnseen,
    RotatedMNIST,
)
from daft_domainbed.errors import UsageError, suggest


class MultipleEnvironmentImageFolder(MultipleDomainDataset):
    """Image files in FOLDER/<domain>/<class>/, read when they are asked for.

    Published sets hold truncated files, shown as far as they go (`ALLOWS_TRUNCATED`).

    Raises:
        UsageError: no such folder, or domains and classes that make no data set; reading a sample: a broken image.
    """

    CHECKPOINT_FREQ = 300
    INPUT_SHAPE = (3, 224, 224)
    INPUT_SPEC = "imagenet"
    ALLOWS_TRUNCATED = True
    FOLDER: ClassVar[str]

    def __init__(self, root: str | None, test_envs: Collection[int], hparams: dict[str, Any]) -> None:
        path = Path(self.FOLDER)
        if not path.is_absolute():
            path = Path(self.require_root(root), path)
        domains = list_domains(path)
        if len(domains) != len(self.ENVIRONMENTS):
            raise UsageError(f"{path} has the domains {', '.join(domains)}: expected {len(self.ENVIRONMENTS)} of them")
        size = hparams.get("input_size", self.INPUT_SHAPE[1])
        self.input_shape = (3, size, size)
        read = partial(read_image, allow_truncated=self.ALLOWS_TRUNCATED)
        self.datasets = []
        for i, domain in enumerate(domains):
            transform = build_transform(size, augment=hparams["data_augmentation"] and i not in test_envs)
            try:
                self.datasets.append(ImageFolder(str(path / domain), transform, loader=read))
            except FileNotFoundError as error:
                raise UsageError(f"no data set in {path / domain}: {error}") from error
        self.num_classes = len(self.datasets[-1].classes)


class VLCS(MultipleEnvironmentImageFolder):
    """Photographs of four collections (Fang et al., 2013)."""

    ENVIRONMENTS = ["C", "L", "S", "V"]
    FOLDER = "VLCS"


class PACS(MultipleEnvironmentImageFolder):
    """Art, cartoons, photographs and sketches (Li et al., 2017)."""

    ENVIRONMENTS = ["A", "C", "P", "S"]
    FOLDER = "PACS"


class DomainNet(MultipleEnvironmentImageFolder):
    """Six styles, 345 classes (Peng et al., 2019)."""

    CHECKPOINT_FREQ = 1000
    ENVIRONMENTS = ["clip", "info", "paint", "quick", "real", "sketch"]
    FOLDER = "domain_net"


class OfficeHome(MultipleEnvironmentImageFolder):
    """Things of office and home in four styles (Venkateswara et al., 2017)."""

    ENVIRONMENTS = ["A", "C", "P", "R"]
    FOLDER = "office_home"


class TerraIncognita(MultipleEnvironmentImageFolder):
    """Camera-trap animals at four locations (Beery et al., 2018)."""

    ENVIRONMENTS = ["L100", "L38", "L43", "L46"]
    FOLDER = "terra_incognita"


def image_folder_class(path: str) -> type[MultipleDomainDataset]:
    """Return a data set class for the image folder at `path`, its domains in alphabetical order.

    The hyperparameter `input_size` is the side of its images in pixels, 224 unless given.

    Raises:
        UsageError: the folder is missing, has less than two domains, or its domains differ in their classes.
    """
    folder = Path(path).expanduser().absolute()
    attributes = {"ENVIRONMENTS": list_domains(folder), "FOLDER": str(folder), "ALLOWS_TRUNCATED": False}
    return type(f"folder:{path}", (MultipleEnvironmentImageFolder,), attributes)


def list_domains(path: Path) -> list[str]:
    """Return the sorted names of the domains below `path`, which must be two or more with the same classes."""
    if not path.is_dir():
        raise UsageError(f"no folder {path}: it should hold <domain>/<class>/<image>")
    domains = _list_folders(path)
    if len(domains) < 2:
        raise UsageError(f"{path} has {len(domains)} domain folders (<domain>/<class>/<image>): at least 2 are needed")
    classes = {domain: set(_list_folders(path / domain)) for domain in domains}
    for domain in domains[1:]:
        if differing := sorted(classes[domain] ^ classes[domains[0]]):
            raise UsageError(
                f"{path}: domains {domains[0]!r} and {domain!r} differ in the classes {', '.join(differing)}; "
                "every domain needs a folder for each class"
            )
    return domains


def _list_folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def build_transform(size: int, augment: bool) -> transforms.Compose:
    """Return what makes a `size` x `size`, ImageNet-normalised tensor of an RGB image, augmented or not."""
    geometry: list[Any] = [transforms.Resize((size, size))]
    if augment:
        geometry = [
            transforms.RandomResizedCrop(size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
        ]
    normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return transforms.Compose([*geometry, transforms.ToTensor(), normalize])


def read_image(path: str, allow_truncated: bool) -> Image.Image:
    """Read an RGB image.

    Raises:
        UsageError: the file is no image, or (unless allowed) its end is missing.
    """
    # Pillow has this switch for the whole process only. It is not put back: loader threads would see it change.
    ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except Exception as error:  # decoders raise errors of every kind
        raise UsageError(f"cannot read the image {path}: {error}; mend or remove it") from error


_CLASSES: dict[str, type[MultipleDomainDataset]] = {
    kind.__name__: kind
    for kind in (
        *(Debug28, Debug224, ColoredMNIST, RotatedMNIST),
        *(VLCS, PACS, OfficeHome, TerraIncognita, DomainNet),
        *(EmojiStyles, EmojiStylesUnseen, ColoredDigits, DocRanking),
    )
}
DATASETS = list(_CLASSES)
UPSTREAM_DATASETS = ["SVIRO", "WILDSCamelyon", "WILDSFMoW"] + [
    f"Spawrious{kind}_{level}" for kind in ("O2O", "M2M") for level in ("easy", "medium", "hard")
]


def get_dataset_class(name: str) -> type[MultipleDomainDataset]:
    """Return the data set class of that name; `folder:PATH` makes one.

    Raises:
        UsageError: Only upstream has it, nobody has, or the folder is no data set.
    """
    if name.startswith("folder:"):
        return image_folder_class(name.removeprefix("folder:"))
    if name in _CLASSES:
        return _CLASSES[name]
    if name in UPSTREAM_DATASETS:
        raise UsageError(f"data set {name!r} is not in the embedded host: your own DomainBed has it, `--host upstream`")
    hint = suggest(name, [*DATASETS, *UPSTREAM_DATASETS])
    raise UsageError(f"unknown data set {name!r}; your own images: folder:PATH.{hint}")


def num_environments(name: str) -> int:
    """Return the number of domains of a data set."""
    return len(get_dataset_class(name).ENVIRONMENTS)
