"""What the mixins expect of a host's ERM, for the type checker; never imported at run time."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class ERM(nn.Module):
    """DomainBed's contract: a featurizer, a classifier, their sequence, an optimizer."""

    hparams: dict[str, Any]
    featurizer: nn.Module
    classifier: Any  # nn.Linear, or layers
    network: nn.Module
    optimizer: Any

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None: ...

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one step; return the losses by name."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        """Return logits, [B, K]."""
        raise NotImplementedError
