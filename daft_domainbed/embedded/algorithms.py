"""The Algorithm contract, and ERM (empirical risk minimisation, Vapnik 1998)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.embedded import networks
from daft_domainbed.errors import UsageError, suggest

Shape = tuple[int, ...]
Minibatches = Sequence[tuple[Tensor, Tensor]]

ALGORITHMS = ["ERM"]

UPSTREAM_ALGORITHMS = [
    "ERMPlusPlus", "Fish", "IRM", "GroupDRO", "Mixup", "MLDG", "CORAL", "MMD", "DANN", "CDANN", "MTL", "SagNet", "ARM",
    "VREx", "RSC", "SD", "ANDMask", "SANDMask", "IGA", "SelfReg", "Fishr", "TRM", "IB_ERM", "IB_IRM", "CAD", "CondCAD",
    "Transfer", "CausIRL_CORAL", "CausIRL_MMD", "EQRM", "RDM", "ADRMX", "URM",
]  # fmt: skip


def get_algorithm_class(name: str) -> type[Algorithm]:
    """Return the algorithm class of that name.

    Raises:
        UsageError: only upstream has it, or nobody has.
    """
    if name in ALGORITHMS:
        return globals()[name]
    if name in UPSTREAM_ALGORITHMS:
        raise UsageError(
            f"algorithm {name!r} is not in the embedded host: your own DomainBed has it, `--host upstream`"
        )
    raise UsageError(f"unknown algorithm {name!r}.{suggest(name, [*ALGORITHMS, *UPSTREAM_ALGORITHMS])}")


class Algorithm(nn.Module):
    """A way to train: `update` takes a step, `predict` gives logits."""

    def __init__(self, input_shape: Shape, num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__()
        self.hparams = hparams

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        """Take one step on a (x, y) minibatch per training domain; return the losses by name.

        `unlabeled` holds images of the test domains, in domain adaptation only.
        """
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        """Return logits [B, classes] for images [B, ...]."""
        raise NotImplementedError


class ERM(Algorithm):
    """Cross-entropy on all training domains pooled, minimised by Adam."""

    def __init__(self, input_shape: Shape, num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.featurizer = networks.Featurizer(input_shape, hparams)
        self.classifier = networks.Classifier(self.featurizer.n_outputs, num_classes, hparams["nonlinear_classifier"])
        self.network = nn.Sequential(self.featurizer, self.classifier)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=hparams["lr"], weight_decay=hparams["weight_decay"]
        )

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:  # noqa: D102
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])
        loss = F.cross_entropy(self.predict(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}

    def predict(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.network(x)
