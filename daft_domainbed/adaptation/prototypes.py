"""No adaptation, source prototypes in the place of the head: what OWTTT is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.adaptation.network import Network
from daft_domainbed.adaptation.sources import SourceStatistics


class NearestPrototype:
    """Answers with the class of the nearest source prototype; its score is one minus that cosine similarity.

    Source: "TEST" of OWTTT (Li et al., 2023, arXiv 2308.09942), where the adaptive threshold rejects as here.
    """

    notice = ""
    changes_weights = False
    uses_features = True

    def __init__(self, network: Network, source: SourceStatistics) -> None:
        self.network, self.prototypes = network, source.prototypes

    @torch.no_grad()
    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Answer a batch of pixels: classes, [B], and scores, [B]."""
        similarity, answers = (F.normalize(self.network.encode(x)) @ self.prototypes.T).max(1)
        return answers, 1 - similarity
