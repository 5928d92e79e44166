"""Data sets of several domains: the host's own, the two inside the package, and any image folder.

Sets that live in memory keep images as uint8 and are indexed in batches; with one seed, a batch made at once equals
its samples made one by one, in values and in random draws.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import MNIST, ImageFolder

from daft_domainbed.embedded.data import EMOJI_CLASSES, is_unseen, load_digits, load_emoji_styles
from daft_domainbed.errors import UsageError, suggest

DATASETS = [
    "Debug28", "Debug224", "ColoredMNIST", "RotatedMNIST", "VLCS", "PACS", "OfficeHome", "TerraIncognita", "DomainNet",
    "EmojiStyles", "EmojiStylesUnseen", "ColoredDigits",
]  # fmt: skip

UPSTREAM_DATASETS = ["SVIRO", "WILDSCamelyon", "WILDSFMoW"] + [
    f"Spawrious{kind}_{level}" for kind in ("O2O", "M2M") for level in ("easy", "medium", "hard")
]


def get_dataset_class(name: str) -> type[MultipleDomainDataset]:
    """Return the data set class of that name; `folder:PATH` makes one.

    Raises:
        UsageError: only upstream has it, nobody has, or the folder is no data set.
    """
    if name.startswith("folder:"):
        return image_folder_class(name.removeprefix("folder:"))
    if name in DATASETS:
        return globals()[name]
    if name in UPSTREAM_DATASETS:
        raise UsageError(f"data set {name!r} is not in the embedded host: your own DomainBed has it, `--host upstream`")
    hint = suggest(name, [*DATASETS, *UPSTREAM_DATASETS])
    raise UsageError(f"unknown data set {name!r}; your own images: folder:PATH.{hint}")


def num_environments(name: str) -> int:
    """Return the number of domains of a data set."""
    return len(get_dataset_class(name).ENVIRONMENTS)


class MultipleDomainDataset:
    """A sequence of domains, each a data set of (image, class) samples.

    `INPUT_SPEC` says what a pixel is: "imagenet" (normalised), "unit" (in [0, 1]) or "none" (noise without a box);
    `SEEDED` whether the seed at construction decides the data; `SMALL` whether small-image hyperparameters fit.
    """

    N_STEPS = 5001
    CHECKPOINT_FREQ = 100
    N_WORKERS = 8
    ENVIRONMENTS: ClassVar[list[str]]
    INPUT_SHAPE: ClassVar[tuple[int, ...]]
    INPUT_SPEC = "unit"
    SEEDED = False
    SMALL = False

    datasets: list[Any]
    input_shape: tuple[int, ...]
    num_classes: int

    def __init__(self, root: str | None, test_envs: Collection[int], hparams: dict[str, Any]) -> None:
        raise NotImplementedError

    @classmethod
    def require_root(cls, root: str | None) -> str:
        """Return the data folder, or say that it is needed."""
        if root is None:
            raise UsageError(f"{cls.__name__} is read from files: say where with --data_dir")
        return root

    def __getitem__(self, index: int) -> Any:
        return self.datasets[index]

    def __len__(self) -> int:
        return len(self.datasets)


class InMemoryDomain(Dataset[tuple[Tensor, Tensor]]):
    """Images, float or uint8 [N, C, H, W], and labels, int64 [N]; uint8 is served as floats in [0, 1]."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.fetch(torch.tensor([index]))
        return x[0], y[0]

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the samples at `indices` (int64 [B]): float32 [B, C, H, W] and int64 [B]."""
        return _to_float(self.images[indices]), self.labels[indices]

    def raw(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return what identifies the samples at `indices`, whatever the host and the augmentation."""
        return self.fetch(indices)


class DrawingsDomain(InMemoryDomain):
    """Drawings on white, uint8; with `augment`, each is shifted by up to 4 pixels, and mirrored half the time."""

    def __init__(self, images: Tensor, labels: Tensor, augment: bool) -> None:
        super().__init__(images, labels)
        self.augment = augment

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        images = self.images[indices]
        if self.augment:
            images = shift_and_flip(images, torch.rand(len(indices), 3))
        return _to_float(images), self.labels[indices]

    def raw(self, indices: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.images[indices], self.labels[indices]


def _to_float(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def shift_and_flip(images: Tensor, draws: Tensor, limit: int = 4) -> Tensor:
    """Shift each image [B, C, H, W] by up to `limit` pixels, white moving in; mirror those with draws[:, 0] < 1/2.

    Args:
        images: uint8.
        draws: [B, 3], uniform in [0, 1): mirroring, vertical shift, horizontal shift.
        limit: in pixels.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, [limit] * 4, value=255)
    starts = (draws[:, 1:] * (2 * limit + 1)).long()
    y, x = torch.arange(height), torch.arange(width)
    columns = starts[:, 1:] + torch.where(draws[:, :1] < 0.5, width - 1 - x, x)
    rows = starts[:, :1] + y
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    pixels = pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return padded.flatten(2).gather(2, pixels).view(images.shape)


class Debug(MultipleDomainDataset):
    """Noise: 16 images and random labels a domain."""

    ENVIRONMENTS = ["0", "1", "2"]
    INPUT_SPEC = "none"
    SEEDED = True
    num_classes = 2

    def __init__(self, root: str | None, test_envs: Collection[int], hparams: dict[str, Any]) -> None:
        self.input_shape = self.INPUT_SHAPE
        self.datasets = [
            InMemoryDomain(torch.randn(16, *self.INPUT_SHAPE), torch.randint(0, 2, (16,))) for _ in self.ENVIRONMENTS
        ]


class Debug28(Debug):
    """Noise of MNIST's size."""

    INPUT_SHAPE = (3, 28, 28)


class Debug224(Debug):
    """Noise of ImageNet's size."""

    INPUT_SHAPE = (3, 224, 224)


class DealtDigits(MultipleDomainDataset):
    """Handwritten digits, dealt to the domains at random and changed by each in its way."""

    SEEDED = True
    CHANGES: ClassVar[list[float]]

    def __init__(self, root: str | None, test_envs: Collection[int], hparams: dict[str, Any]) -> None:
        self.input_shape = self.INPUT_SHAPE
        images, digits = self.read_digits(root)
        order = torch.randperm(len(images))
        hands = [order[i :: len(self.CHANGES)] for i in range(len(self.CHANGES))]
        self.datasets = [
            InMemoryDomain(*self.change(images[hand], digits[hand], by))
            for hand, by in zip(hands, self.CHANGES, strict=True)
        ]

    def read_digits(self, root: str | None) -> tuple[Tensor, Tensor]:
        """Read MNIST's (LeCun et al., 1998) training and test images, uint8 [N, 28, 28], and digits, int64 [N]."""
        root = self.require_root(root)
        try:
            parts = [MNIST(root, train=train, download=False) for train in (True, False)]
        except (RuntimeError, ValueError, AssertionError, OSError) as error:
            files = "{train,t10k}-{images-idx3,labels-idx1}-ubyte"
            command = f'python -c "import torchvision; torchvision.datasets.MNIST({root!r}, download=True)"'
            raise UsageError(
                f"cannot read MNIST's files {files} in {Path(root, 'MNIST', 'raw')}; this brings them: {command}"
            ) from error
        return torch.cat([part.data for part in parts]), torch.cat([part.targets for part in parts])

    def change(self, images: Tensor, digits: Tensor, by: float) -> tuple[Tensor, Tensor]:
        """Return the images [N, C, 28, 28] and labels of the domain with the parameter `by`."""
        raise NotImplementedError


class RotatedMNIST(DealtDigits):
    """MNIST rotated by 0 to 75 degrees, counter-clockwise (Ghifary et al., 2015)."""

    ENVIRONMENTS = ["0", "15", "30", "45", "60", "75"]
    CHANGES = [0, 15, 30, 45, 60, 75]
    INPUT_SHAPE = (1, 28, 28)
    num_classes = 10

    def change(self, images: Tensor, digits: Tensor, by: float) -> tuple[Tensor, Tensor]:  # noqa: D102
        pictures = [Image.fromarray(image).rotate(by, Image.Resampling.BILINEAR) for image in images.numpy()]
        return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).unsqueeze(1), digits


class ColoredMNIST(DealtDigits):
    """Digits below 5 against the others, 25 % of the labels wrong, told by a colour that misleads in the last domain.

    Colour and label differ with probability 0.1, 0.2 and 0.9 (Arjovsky et al., 2019). The red channel means label 0.
    """

    ENVIRONMENTS = ["+90%", "+80%", "-90%"]
    CHANGES = [0.1, 0.2, 0.9]
    INPUT_SHAPE = (2, 28, 28)
    num_classes = 2

    def change(self, images: Tensor, digits: Tensor, by: float) -> tuple[Tensor, Tensor]:  # noqa: D102
        labels = (digits < 5) ^ (torch.rand(len(digits)) < 0.25)
        colors = labels ^ (torch.rand(len(digits)) < by)
        colored = torch.zeros(len(images), 2, *images.shape[1:], dtype=images.dtype)
        colored[torch.arange(len(images)), colors.long()] = images
        return colored, labels.long()


class ColoredDigits(ColoredMNIST):
    """ColoredMNIST's rule on the 1,797 digits of UCI's optical recognition set, which the package holds."""

    N_STEPS = 400
    N_WORKERS = 0
    SMALL = True

    def read_digits(self, root: str | None) -> tuple[Tensor, Tensor]:  # noqa: D102
        images, digits = load_digits()
        return enlarge(torch.tensor(images)), torch.tensor(digits)


def enlarge(digits: Tensor) -> Tensor:
    """Enlarge digits [N, 8, 8] of values 0 to 16 bilinearly to uint8 [N, 28, 28]."""
    # In integers (weights are fourteenths), so that no machine rounds a half otherwise.
    weights = (14 * F.interpolate(torch.eye(8)[None], size=28, mode="linear")[0]).round().long()
    sums = weights.T @ digits.long() @ weights
    scale = 16 * 14 * 14
    return ((255 * sums + scale // 2) // scale).to(torch.uint8)


class EmojiStyles(MultipleDomainDataset):
    """Emoji of eight classes as four groups of artists drew them: a domain is a style."""

    ENVIRONMENTS = ["noto", "twemoji", "openmoji", "contrast"]
    N_STEPS = 400
    N_WORKERS = 0
    INPUT_SHAPE = (3, 32, 32)
    SMALL = True
    num_classes = len(EMOJI_CLASSES)

    def __init__(self, root: str | None, test_envs: Collection[int], hparams: dict[str, Any]) -> None:
        self.input_shape = self.INPUT_SHAPE
        sheets = load_emoji_styles()
        self.datasets = []
        for i, style in enumerate(self.ENVIRONMENTS):
            sheet, is_test = sheets[style], i in test_envs
            kept = [self.shows(code_point, is_test) for code_point in sheet.code_points]
            images, labels = torch.from_numpy(sheet.images[kept]), torch.from_numpy(sheet.labels[kept])
            self.datasets.append(DrawingsDomain(images, labels, hparams["data_augmentation"] and not is_test))

    def shows(self, code_point: str, is_test: bool) -> bool:
        """Return whether a (test or training) domain has the drawing of a code point."""
        return True


class EmojiStylesUnseen(EmojiStyles):
    """EmojiStyles, where test domains show only the things that training domains never show."""

    def shows(self, code_point: str, is_test: bool) -> bool:  # noqa: D102
        return is_unseen(code_point) == is_test


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
