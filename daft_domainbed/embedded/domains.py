"""What a data set is, a sequence of domains; and domains that lie in memory.

These keep images as uint8 and are indexed in batches; with one seed, a batch made at once equals its samples made one
by one, in values and in random draws.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from daft_domainbed.errors import UsageError


class MultipleDomainDataset:
    """A sequence of domains, each a data set of (image, class) samples.

    `INPUT_SPEC` says what a pixel is: "imagenet" (normalised), "unit" (in [0, 1]), "none" (noise without a box) or
    "tokens" (texts); `SEEDED` whether the seed at construction decides the data; `SMALL` whether small-image
    hyperparameters fit; `HPARAMS` which defaults and random draws (None: the default) the set has of its own.
    """

    N_STEPS = 5001
    CHECKPOINT_FREQ = 100
    N_WORKERS = 8
    ENVIRONMENTS: ClassVar[list[str]]
    INPUT_SHAPE: ClassVar[tuple[int, ...]]
    INPUT_SPEC = "unit"
    SEEDED = False
    SMALL = False
    HPARAMS: ClassVar[dict[str, tuple[Any, Callable[[np.random.RandomState], Any] | None]]] = {}

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

    def draw(self, count: int) -> Tensor:
        """Return what `fetch` would draw for so many images."""
        return torch.rand(count, 3)

    def fetch(self, indices: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: D102
        images = self.images[indices]
        if self.augment:
            images = shift_and_flip(images, self.draw(len(indices)) if draws is None else draws)
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
