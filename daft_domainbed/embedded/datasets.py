"""Data sets of several domains by name; those of image files, in the published sets and in any folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial, wraps
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, ImageFile
from torchvision import transforms
from torchvision.datasets.folder import default_loader

from daft_domainbed.embedded.documents import DocRanking
from daft_domainbed.embedded.domains import MultipleDomainDataset
from daft_domainbed.embedded.image_folder import ImageDomain, identify, list_domains
from daft_domainbed.embedded.in_memory import (
    ColoredDigits,
    ColoredMNIST,
    Debug28,
    Debug224,
    EmojiStyles,
    EmojiStylesUnseen,
    RotatedMNIST,
)
from daft_domainbed.embedded.pixels import convert_to_rgb
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
    IS_OWN = False
    FOLDER: ClassVar[str]

    def __init__(self, root: str | None, test_envs: Collection[int], hparams: dict[str, Any]) -> None:
        path = Path(self.FOLDER)
        if not path.is_absolute():
            path = Path(self.require_root(root), path)
        size = hparams.get("input_size", self.INPUT_SHAPE[1])
        self.input_shape = (3, size, size)
        read = partial(read_image, allow_truncated=self.ALLOWS_TRUNCATED)
        self.datasets = read_domains(
            path, self.ENVIRONMENTS, test_envs, hparams["data_augmentation"], size, read, is_own=self.IS_OWN
        )
        self.num_classes = len(self.datasets[-1].classes)


def read_domains(
    path: Path,
    environments: Collection[str] | None,
    test_envs: Collection[int],
    augment: bool,
    size: int,
    read: Callable[[str], Any],
    *,
    is_own: bool = False,
) -> list[ImageDomain]:
    """Return the domains of an image folder.

    Args:
        path: It holds <domain>/<class>/<image>.
        environments: As many domains are expected; None is any number.
        test_envs: Domains whose images are never augmented.
        augment: Whether the others' are.
        size: Side of an image in pixels.
        read: Reads an image's file.
        is_own: Whether it is the user's own.

    Raises:
        UsageError: The folder is missing, or its domains and classes make no data set.
    """
    domains = list_domains(path, is_own=is_own)
    if environments is not None and len(domains) != len(environments):
        raise UsageError(f"{path} has the domains {', '.join(domains)}: expected {len(environments)} of them")
    return [
        ImageDomain(str(path / domain), build_transform(size, augment=augment and i not in test_envs), loader=read)
        for i, domain in enumerate(domains)
    ]


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
    environments = list_domains(folder, is_own=True)
    attributes = {"ENVIRONMENTS": environments, "FOLDER": str(folder), "ALLOWS_TRUNCATED": False, "IS_OWN": True}
    name = f"folder:{path}".encode(
        errors="backslashreplace"
    ).decode()  # a class may not be called by bytes that are no text
    return type(name, (MultipleEnvironmentImageFolder,), attributes)


def identify_folder(path: str) -> str:
    """Return the hash by which the image folder at `path` is known wherever it lies, as `image_folder.identify` says.

    Raises:
        UsageError: It is no data set.
    """
    return identify(read_domains(Path(path), None, [], False, 1, default_loader, is_own=True))


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
    """Read an RGB image; one of more than 8 bits a channel is scaled, as `pixels.convert_to_rgb` says.

    Raises:
        UsageError: the file is no image, too large, or (unless allowed) its end is missing.
    """
    # Pillow has this switch for the whole process only. It is not put back: loader threads would see it change.
    ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated
    try:
        with open(path, "rb") as file:
            return convert_to_rgb(Image.open(file))
    except Exception as error:  # decoders raise errors of every kind
        raise UsageError(f"cannot read the image {path}: {error}; mend or remove it") from error


@wraps(default_loader)  # whose name is part of the key of decoded images
def read_published(path: str) -> Image.Image:
    """Read an image of a published set as upstream's classes do, with its name where it cannot be read."""
    return read_image(path, allow_truncated=True)


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
