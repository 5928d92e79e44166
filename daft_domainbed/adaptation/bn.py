"""Batch norm with the statistics of the batch that is asked about."""

from __future__ import annotations

import torch
from torch import Tensor

from daft_domainbed.adaptation.network import Network, score_doubt


class BatchNormStatistics:
    """Answers as the source model does, with the statistics of each batch in all batch norm layers.

    One image has no statistics worth the name, so a batch of one is answered with the source's.

    Source: prediction-time batch normalisation (Nado et al., 2020, arXiv 2006.10963; Schneider et al., 2020, arXiv
    2006.16971, with no source samples mixed in).
    """

    changes_weights = False
    uses_features = False

    def __init__(self, network: Network, source: object) -> None:
        self.network = network
        self.notice = "" if network.list_batch_norms() else "there is no batch norm to adapt, so it answers as source"

    @torch.no_grad()
    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Answer a batch of pixels: classes, [B], and scores, [B]."""
        if len(x) > 1:
            with self.network.batch_statistics(are_kept=False):
                logits = self.network.predict(x)
        else:
            logits = self.network.predict(x)
        return logits.argmax(1), score_doubt(logits)
