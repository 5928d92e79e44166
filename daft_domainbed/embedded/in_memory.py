"""Data sets that lie in memory: noise, digits, and the drawings inside the package."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.datasets import MNIST

from daft_domainbed.embedded.data import EMOJI_CLASSES, is_unseen, load_digits, load_emoji_styles
from daft_domainbed.embedded.domains import DrawingsDomain, InMemoryDomain, MultipleDomainDataset
from daft_domainbed.errors import UsageError

# DomainBed's largest draw, 512, would exceed a domain of the sets that are inside the package.
SMALL_BATCHES = (32, lambda random: int(2 ** random.uniform(3, 7)))


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
    CLASSES = [str(digit) for digit in range(10)]
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
    HPARAMS = {"batch_size": SMALL_BATCHES, "backbone": ("resnet8_w8", None)}

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
    HPARAMS = {"batch_size": SMALL_BATCHES, "backbone": ("resnet8_w8", None)}
    CLASSES = list(EMOJI_CLASSES)
    num_classes = len(CLASSES)

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
