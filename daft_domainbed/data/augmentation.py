"""DomainBed's image transforms in two halves: what they draw, in order, and what they compute, on any thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from daft_domainbed.data.color_jitter import GRAYSCALE, Step, load_compiled, render

_AUGMENTING = [transforms.RandomResizedCrop, transforms.RandomHorizontalFlip, transforms.ColorJitter]
_AUGMENTING += [transforms.RandomGrayscale, transforms.ToTensor, transforms.Normalize]
_PLAIN = [transforms.Resize, transforms.ToTensor, transforms.Normalize]


@dataclass(frozen=True)
class Draw:
    """What one image's transform has drawn: the crop (top, left, height, width), and what is done to it."""

    crop: tuple[int, int, int, int]
    is_mirrored: bool
    steps: list[Step]


class SplitTransform:
    """One of upstream's transforms, whose numbers it gives bit for bit.

    Args:
        parts: The torchvision transform's: crop, flip, jitter, grayscale, to tensor, normalise; or resize instead of
            the first four.
    """

    def __init__(self, parts: list[Any]) -> None:
        self.geometry, *self.augmenting = parts[:-2]
        self.draws = bool(self.augmenting)
        self.height, self.width = self.geometry.size
        load_compiled()
        values = np.arange(256, dtype=np.uint8).repeat(3).reshape(256, 1, 3)
        self.table = transforms.Compose(parts[-2:])(values)[:, :, 0].contiguous().numpy()

    def draw(self, height: int, width: int) -> Draw:
        """Draw for an image of this size from the global generators, as torchvision would."""
        flip, jitter, grayscale = self.augmenting
        image = torch.empty(1, 1, 1).expand(3, height, width)  # they look at its size only
        crop = self.geometry.get_params(image, self.geometry.scale, self.geometry.ratio)
        is_mirrored = bool(torch.rand(1) < flip.p)
        order, *factors = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        steps = [(kind, factors[kind]) for kind in order.tolist() if factors[kind] is not None]
        if torch.rand(1) < grayscale.p:
            steps.append((GRAYSCALE, 0.0))
        return Draw(crop, is_mirrored, steps)

    def apply(self, image: Image.Image, draw: Draw | None, out: NDArray[np.float32]) -> None:
        """Compute the tensor of an image, [3, height, width], into `out`; draws nothing."""
        if draw is None:
            render(self.geometry(image), [], False, self.table, out)
            return
        resized = functional.resized_crop(
            image, *draw.crop, self.geometry.size, self.geometry.interpolation, antialias=self.geometry.antialias
        )
        render(resized, draw.steps, draw.is_mirrored, self.table, out)


def split_transform(transform: Any) -> SplitTransform | None:
    """Return a transform in two halves, or None if it is not exactly one of upstream's."""
    if type(transform) is not transforms.Compose or torch.get_default_dtype() != torch.float32:
        return None
    parts = transform.transforms
    if [type(part) for part in parts] not in (_AUGMENTING, _PLAIN):
        return None
    is_rectangle = isinstance(parts[0].size, (tuple, list)) and len(parts[0].size) == 2
    return SplitTransform(parts) if is_rectangle and len(parts[-1].mean) == 3 else None
