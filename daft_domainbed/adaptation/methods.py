"""The ways of meeting a stream, by name, each in a file of its own."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from daft_domainbed.adaptation.bn import BatchNormStatistics
from daft_domainbed.adaptation.network import Network
from daft_domainbed.adaptation.owttt import Owttt
from daft_domainbed.adaptation.prototypes import NearestPrototype
from daft_domainbed.adaptation.source import Source
from daft_domainbed.adaptation.t3a import T3A
from daft_domainbed.adaptation.tent import Tent


class Adapter(Protocol):
    """A way of meeting a stream.

    Attributes:
        notice: Why it adapts less than it should; empty where nothing is the matter.
        changes_weights: Whether the network that it has at the end answers as adapted, with nothing beside.
        uses_features: Whether it needs the source statistics, which are None otherwise.
    """

    notice: str
    changes_weights: bool
    uses_features: bool

    def __init__(self, network: Network, source: Any) -> None:
        """Begin with a model as it was trained, and the source's `SourceStatistics`."""

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Adapt to a batch of pixels, and answer it: classes, [B], and scores, [B], high for images from outside."""


METHODS: dict[str, type[Adapter]] = {
    "source": Source,
    "test": NearestPrototype,
    "bn": BatchNormStatistics,
    "tent": Tent,
    "t3a": T3A,
    "owttt": Owttt,
}
