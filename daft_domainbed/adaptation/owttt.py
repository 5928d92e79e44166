"""OWTTT: self-training on a stream with source prototypes, and prototypes of what is in no class.

Source: Li et al., 2023 (ICCV), arXiv 2308.09942, and the authors' code where the two differ or the paper is silent.
docs/methods/owttt.md has the update in equations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.adaptation.alignment import RunningGaussian
from daft_domainbed.adaptation.network import NOT_FINITE, Network, take_step
from daft_domainbed.adaptation.sources import SourceStatistics
from daft_domainbed.adaptation.threshold import AdaptiveThreshold, find_threshold


@dataclass(frozen=True)
class Settings:
    """OWTTT's hyperparameters, by default those of the authors' CIFAR-100-C.

    Attributes:
        lr: Of SGD with momentum 0.9.
        alignment: Weight of the divergence of Gaussians (da_scale), which is scaled by 0.05 besides.
        clustering: Weight of the cross-entropies (ce_scale).
        temperature: Of cosine similarities (delta).
        most: Prototypes in the pool.
    """

    lr: float = 0.001
    alignment: float = 1.0
    clustering: float = 0.2
    temperature: float = 0.1
    most: int = 100


_DIVERGENCE_SCALE = 0.05


class Pool:
    """Prototypes of images that are in no class, the oldest of which goes when it is full."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.memory: Tensor | None = None

    def measure_similarity(self, features: Tensor) -> Tensor | None:
        """Return the similarity of normalised features, [B, D], to the nearest prototype, [B]; None without any."""
        return None if self.memory is None else (features @ self.memory.T).amax(1)

    def expand(self, features: Tensor, weak: Tensor, threshold: float, novelty: float) -> None:
        """Take in features of outside images that are far from all prototypes, farthest from the classes first.

        Args:
            features: Normalised, [B, D].
            weak: Similarity to the nearest class, [B].
            threshold: Only images whose 1 - `weak` is above it are from outside.
            novelty: 1 - the similarity to the nearest prototype of both kinds has to be above it.
        """
        for i in weak.argsort(stable=True).tolist():
            if not 1 - weak[i] > threshold:
                break
            own = self.measure_similarity(features[i : i + 1])
            nearest = weak[i] if own is None else torch.maximum(weak[i], own[0])
            if 1 - nearest > novelty:
                self._append(features[i : i + 1].detach())

    def _append(self, feature: Tensor) -> None:
        kept = [] if self.memory is None else [self.memory[max(len(self.memory) - self.most + 1, 0) :]]
        self.memory = F.normalize(torch.cat([*kept, feature]))


class Owttt:
    """Adapts the whole featurizer to a batch, then answers it with the nearest source prototype.

    Two samples at least are needed for statistics, so a batch that gives fewer of known classes aligns nothing.
    """

    changes_weights = True
    uses_features = True

    def __init__(self, network: Network, source: SourceStatistics, settings: Settings | None = None) -> None:
        self.network, self.source, self.settings = network, source, settings or Settings()
        self.parameters = [p.requires_grad_() for p in network.model.algorithm.featurizer.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=self.settings.lr, momentum=0.9)
        self.pool, self.threshold = Pool(self.settings.most), AdaptiveThreshold()
        self.gaussian = RunningGaussian(source.mean, source.covariance)
        self.notice = ""

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Adapt to a batch of pixels, and answer it: classes, [B], and scores, [B]."""
        if not self.notice:
            self._adapt(x)
        answers, score = self._answer(x)
        if not self.notice and not score.isfinite().all():
            self._give_up()
            answers, score = self._answer(x)
        return answers, score

    @torch.no_grad()
    def _answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        similarity, answers = self._compare(self.network.encode(x)).max(1)
        return answers, 1 - similarity

    def _compare(self, features: Tensor) -> Tensor:
        """Return cosine similarities to source prototypes, [B, K]."""
        return F.normalize(features) @ self.source.prototypes.T

    def _adapt(self, x: Tensor) -> None:
        try:
            loss = self.measure_loss(x)
            is_finite = loss is None or take_step(self.optimizer, loss, self.parameters)
        except torch.linalg.LinAlgError:  # of a covariance that is not finite
            is_finite = False
        if not is_finite:
            self._give_up()

    def _give_up(self) -> None:
        self.network.restore()
        self.notice = NOT_FINITE

    def measure_loss(self, x: Tensor) -> Tensor | None:
        """Return the loss of a batch of pixels, None where it selects no sample; threshold, pool, Gaussian move on."""
        features = F.normalize(self.network.encode(x))
        weak = features @ self.source.prototypes.T
        nearest = weak.amax(1)
        strong = self.pool.measure_similarity(features)  # of before this batch, as everything below
        score = (1 - nearest).detach()
        threshold = self.threshold.update(score)
        is_seen = score < threshold
        self._expand(features.detach(), nearest.detach(), strong, is_seen, threshold)
        terms = []
        if is_seen.sum() > 1:
            terms.append(self.settings.alignment * _DIVERGENCE_SCALE * self._align(x[is_seen]))
        if strong is not None:
            clustering = self._cluster(weak, strong, score, is_seen)
            terms += [self.settings.clustering * term / 2 for term in clustering]
        return torch.stack(terms).sum() if terms else None

    def _expand(
        self, features: Tensor, nearest: Tensor, strong: Tensor | None, is_seen: Tensor, threshold: float
    ) -> None:
        if is_seen.all():
            return
        known = nearest if strong is None else torch.maximum(nearest, strong.detach())
        novelty = find_threshold((1 - known)[~is_seen].double().tolist())
        self.pool.expand(features, nearest, threshold, novelty)

    def _align(self, x: Tensor) -> Tensor:
        """Return the divergence of the stream's Gaussian from the source's, with batch norm as in training."""
        with self.network.batch_statistics(are_kept=True):
            return self.gaussian.update(self.network.encode(x))

    def _cluster(self, weak: Tensor, strong: Tensor, score: Tensor, is_seen: Tensor) -> list[Tensor]:
        """Return the cross-entropies of samples that are surely of a class, and surely of none; without empty ones."""
        logits = torch.cat([weak, strong[:, None]], 1) / self.settings.temperature
        n_classes = weak.shape[1]
        seen, unseen = choose_sure(score, is_seen)
        terms = []
        if seen.any():
            terms.append(F.cross_entropy(logits[seen, :n_classes], weak[seen].argmax(1)))
        if unseen.any():
            labels = torch.full((int(unseen.sum()),), n_classes, device=logits.device)
            terms.append(F.cross_entropy(logits[unseen], labels))
        return terms


def choose_sure(score: Tensor, is_seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the samples of known classes, [B], and of none, [B], that lie in the better half of their kind.

    As in the authors' code: of n of one kind at most n // 2 - 1 with the lowest scores, of n of the other n // 2 with
    the highest; where one kind is absent, all of the other.

    Args:
        score: High for images from outside, [B].
        is_seen: Which samples are taken for known ones, [B].

    Example:
        >>> score = torch.tensor([0.1, 0.2, 0.3, 0.35, 0.8, 0.9])
        >>> seen, unseen = choose_sure(score, score < 0.5)
        >>> seen.int().tolist(), unseen.int().tolist()
        ([1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1])
    """
    is_unseen = ~is_seen
    if is_seen.all() or is_unseen.all():
        return is_seen, is_unseen
    lowest = score[is_seen].sort().values
    highest = score[is_unseen].sort(descending=True).values
    below = lowest[max(len(lowest) // 2 - 1, 0)]
    return is_seen & (score < below), is_unseen & (score > highest[len(highest) // 2])
