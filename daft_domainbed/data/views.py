"""A fixed number of augmented views of each image, so that what a network makes of them can be kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from daft_domainbed.runtime.randomness import preserve_states


@dataclass(frozen=True)
class Views:
    """The views of one environment's images; which of them a batch shows is drawn as augmentation is.

    Attributes:
        count: How many views an image has.
        seed: Of the run, which decides what they look like.
        env: The environment's number.
    """

    count: int
    seed: int
    env: int

    def draw(self, keys: Sequence[int], draw: Callable[[int], Any]) -> list[Any]:
        """Return what a function draws from the global generators for a view of each image.

        Args:
            keys: Of the images.
            draw: Told the place of an image in `keys`; for one view it draws the same every time.
        """
        numbers = torch.randint(self.count, (len(keys),)).tolist()
        drawn = []
        with preserve_states(cuda=False):
            for i, (key, number) in enumerate(zip(keys, numbers, strict=True)):
                _seed_generators(f"{self.seed} {self.env} {key} {number}")
                drawn.append(draw(i))
        return drawn

    def fetch_drawn(self, keys: Tensor, data: Any) -> tuple[Tensor, Tensor]:
        """Return the same as `fetch` of a data set that tells what it draws, and computes a batch at a time.

        Args:
            keys: Of the images of the batch.
            data: Has `draw(count)`, and `fetch(keys, draws)`.
        """
        draws = self.draw(keys.tolist(), lambda _: data.draw(1))
        samples: tuple[Tensor, Tensor] = data.fetch(keys, torch.cat(draws))
        return samples

    def fetch(
        self, keys: Sequence[int], fetch: Callable[[list[int]], tuple[Tensor, Tensor]], indices: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Return a batch of views, images [B, ...] and labels [B].

        Args:
            keys: Of all images of the split.
            fetch: Makes a batch from indices.
            indices: Of the images of the batch.
        """
        samples = self.draw([keys[index] for index in indices], lambda i: fetch([indices[i]]))
        return torch.cat([x for x, _ in samples]), torch.cat([y for _, y in samples])


def make_views(hparams: Mapping[str, Any], seed: int, env: int) -> Views | None:
    """Return the views of an environment that a run asks for; None where each time another one is drawn."""
    count = hparams.get("n_views", 0)
    return Views(count, seed, env) if count else None


def _seed_generators(name: str) -> None:
    seed = int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
