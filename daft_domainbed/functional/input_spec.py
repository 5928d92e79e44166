"""How images were normalised, and what a pixel is then worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputSpec:
    """How pixels in [0, 1] became the network's input: x = (pixel - mean) / std, per channel.

    Attributes:
        mean: Per channel, or one value for all.
        std: Per channel, or one value for all.
        has_box: False for inputs that are no images (Debug's Gaussian noise), which nothing bounds.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    has_box: bool = True

    def get_mean(self, like: Tensor) -> Tensor:
        """Return mean shaped to broadcast over images, [1, C, 1, 1]."""
        return torch.tensor(self.mean, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)

    def get_std(self, like: Tensor) -> Tensor:
        """Return std shaped to broadcast over images, [1, C, 1, 1]."""
        return torch.tensor(self.std, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)

    def get_box(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the images of pixel values 0 and 1, [1, C, 1, 1] each, or None where nothing bounds the input."""
        if not self.has_box:
            return None
        mean, std = self.get_mean(like), self.get_std(like)
        return (0 - mean) / std, (1 - mean) / std


INPUT_SPECS = {
    "imagenet": InputSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "unit": InputSpec(),
    "none": InputSpec(has_box=False),
    "tokens": InputSpec(has_box=False),  # no image at all: hashes of words
}
