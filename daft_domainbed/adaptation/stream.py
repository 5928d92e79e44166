"""What a model meets at test time: images of a held-out domain, mixed with images of no known class, once each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from daft_domainbed.evaluation.outside import Outside, fit
from daft_domainbed.evaluation.subject import Subject


@dataclass(frozen=True)
class Stream:
    """A domain's in-split and, of a set of outside images, as many as `ratio` says.

    Attributes:
        subject: The model, with its data.
        env: Name of the held-out domain.
        weak: Positions of its images in the environment's data set.
        outside: The set of outside images; None for a closed stream.
        strong: Places of its images.
        seed: Of all draws.
    """

    subject: Subject
    env: str
    weak: list[int]
    outside: Outside | None = None
    strong: list[int] = field(default_factory=list)
    seed: int = 0

    def list_batches(self, trial: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels, [B, C, H, W], and labels, [B], number of classes for outside images, in the trial's order."""
        seed = self.subject.host.misc.seed_hash("stream", self.seed, trial)
        order = torch.randperm(len(self.weak) + len(self.strong), generator=torch.Generator().manual_seed(seed))
        for k, part in enumerate(order.split(size)):
            generator = torch.Generator().manual_seed(self.subject.host.misc.seed_hash("batch", self.seed, trial, k))
            yield self._load(part, generator)

    def _load(self, part: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the images at some places of the order, those of the domain counted first."""
        is_weak = part < len(self.weak)
        pixels, labels = [], []
        if is_weak.any():
            x, y = self.subject.load(self.env, [self.weak[i] for i in part[is_weak].tolist()])
            pixels.append(x)
            labels.append(y)
        if self.outside is not None and not is_weak.all():
            places = [self.strong[i - len(self.weak)] for i in part[~is_weak].tolist()]
            x = fit(self.outside.take(places, generator), self.subject.data.dataset.input_shape)
            pixels.append(x.to(self.subject.model.device))
            labels.append(torch.full((len(places),), self.subject.n_classes, device=self.subject.model.device))
        back = torch.cat([is_weak.nonzero(), (~is_weak).nonzero()]).flatten().argsort()
        return torch.cat(pixels)[back], torch.cat(labels)[back]


def make_stream(subject: Subject, env: int, outside: Outside | None, ratio: float, seed: int) -> Stream:
    """Return the stream of a held-out domain with `ratio` outside images to one of its own, or as many as there are."""
    weak = sorted(int(key) for key in subject.data.in_splits[env].keys)
    if outside is None:
        return Stream(subject, subject.environments[env], weak, seed=seed)
    generator = torch.Generator().manual_seed(subject.host.misc.seed_hash("strong", seed, outside.name))
    strong = sorted(torch.randperm(outside.size, generator=generator)[: round(ratio * len(weak))].tolist())
    return Stream(subject, subject.environments[env], weak, outside, strong, seed)
