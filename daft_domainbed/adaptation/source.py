"""No adaptation: the model as it was trained."""

from __future__ import annotations

import torch
from torch import Tensor

from daft_domainbed.adaptation.network import Network, score_doubt


class Source:
    """Answers with the largest logit; its score is one minus the largest probability.

    Source: the baseline of Hendrycks and Gimpel, 2017.
    """

    notice = ""
    changes_weights = False
    uses_features = False

    def __init__(self, network: Network, source: object) -> None:
        self.network = network

    @torch.no_grad()
    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Answer a batch of pixels: classes, [B], and scores, [B]."""
        logits = self.network.predict(x)
        return logits.argmax(1), score_doubt(logits)
