"""Tent: the entropy of the answers is minimised over batch norm's scales and shifts."""

from __future__ import annotations

import torch
from torch import Tensor

from daft_domainbed.adaptation.network import NOT_FINITE, Network, score_doubt, take_step

LR = 1e-3


def measure_entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of the answers, in nats, from logits, [B, K].

    Example:
        >>> round(measure_entropy(torch.zeros(3, 2)).item(), 4)
        0.6931
    """
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


class Tent:
    """Answers with the statistics of the batch, then takes a step of Adam on the batch's entropy.

    As in the authors' code an answer is from before its own batch's step. A batch of one, which has no statistics, is
    answered with the source's, and no step is taken.

    Source: Wang et al., 2021, arXiv 2006.10726, equations 1 and 2; Adam at 0.001, one step a batch.
    """

    changes_weights = False
    uses_features = False

    def __init__(self, network: Network, source: object) -> None:
        self.network = network
        layers = network.list_batch_norms()
        self.parameters = [parameter.requires_grad_() for layer in layers for parameter in layer.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR) if self.parameters else None
        self.notice = "" if layers else "there is no batch norm to adapt, so it answers as source"

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Answer a batch of pixels, then adapt: classes, [B], and scores, [B]."""
        if len(x) == 1 or self.optimizer is None:
            logits = self._predict(x)
        else:
            with self.network.batch_statistics(are_kept=False):
                logits = self.network.predict(x)
            if not take_step(self.optimizer, measure_entropy(logits), self.parameters):
                self.network.restore()
                self.optimizer, self.notice = None, NOT_FINITE
                logits = self._predict(x)
        return logits.detach().argmax(1), score_doubt(logits.detach())

    @torch.no_grad()
    def _predict(self, x: Tensor) -> Tensor:
        """Return logits with the source's statistics."""
        return self.network.predict(x)
