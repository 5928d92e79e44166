"""T3A: the linear head becomes a mean of confident features of each class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.adaptation.network import Network, score_doubt
from daft_domainbed.adaptation.sources import SourceStatistics
from daft_domainbed.errors import UsageError

MOST = 100  # supports of a class; M of the paper, which chooses among 1, 5, 20, 50, 100 and all


class T3A:
    """Answers with the nearest mean of supports: the head's own rows, and features of the stream that it is sure of.

    Source: Iwasawa and Matsuo, 2021 (NeurIPS), algorithm 1: a feature joins the supports of the class that the source
    head gives it; of a class those of the lowest entropy are kept; logits are z . mean of normalised supports.

    Raises:
        UsageError: The head is not linear, or has no row for each class.
    """

    notice = ""
    changes_weights = False
    uses_features = True

    def __init__(self, network: Network, source: SourceStatistics) -> None:
        self.network = network
        head = getattr(network.model.algorithm, "classifier", None)
        if not isinstance(head, nn.Linear) or head.out_features != len(source.prototypes):
            raise UsageError(
                "t3a takes the place of a linear head with a row a class, and this model has none: leave t3a out of "
                "--methods"
            )
        self.head = head
        self.supports = head.weight.detach().clone()
        self.labels, self.entropies = self._judge(self.supports)

    @torch.no_grad()
    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Adapt to a batch of pixels, and answer it: classes, [B], and scores, [B]."""
        features = self.network.encode(x)
        labels, entropies = self._judge(features)
        self.supports = torch.cat([self.supports, features])
        self.labels = torch.cat([self.labels, labels])
        self.entropies = torch.cat([self.entropies, entropies])
        self._keep_surest()
        members = F.one_hot(self.labels, self.head.out_features).to(features.dtype)
        means = F.normalize(F.normalize(self.supports).T @ members, dim=0)
        logits = features @ means
        return logits.argmax(1), score_doubt(logits)

    @torch.no_grad()
    def _judge(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classes that the source head gives, [B], and the entropies of its answers, [B]."""
        logits = self.head(features)
        return logits.argmax(1), -(logits.softmax(1) * logits.log_softmax(1)).sum(1)

    def _keep_surest(self) -> None:
        kept = []
        for label in range(self.head.out_features):
            own = (self.labels == label).nonzero().flatten()
            kept.append(own[self.entropies[own].argsort()[:MOST]])
        index = torch.cat(kept)
        self.supports, self.labels, self.entropies = self.supports[index], self.labels[index], self.entropies[index]
