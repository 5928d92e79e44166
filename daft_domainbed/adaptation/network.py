"""A model that adaptation may change: a copy of the one that was loaded, with its batch norm in hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.pixel_model import PixelModel

NOT_FINITE = "an update was not finite: it was stopped, the source weights are kept"  # a method's notice


class Network:
    """A copy of a model in evaluation mode.

    Args:
        model: Is not changed.
    """

    def __init__(self, model: PixelModel) -> None:
        self.model = copy.deepcopy(model)
        self.source = {name: value.clone() for name, value in self.model.algorithm.state_dict().items()}

    def predict(self, x: Tensor) -> Tensor:
        """Return logits, [B, K], of pixels."""
        return self.model(x)

    def encode(self, x: Tensor) -> Tensor:
        """Return features, [B, D], of pixels.

        Raises:
            UsageError: The algorithm has no featurizer.
        """
        features = self.model.encode(x)
        if features is None:
            raise UsageError("the algorithm has no featurizer, whose features adapt")
        return features

    def list_batch_norms(self) -> list[_BatchNorm]:
        """Return all batch norm layers; frozen ones too, since they are frozen for training."""
        return [module for module in self.model.algorithm.modules() if isinstance(module, _BatchNorm)]

    @contextmanager
    def batch_statistics(self, *, are_kept: bool) -> Iterator[None]:
        """Have batch norm use the statistics of the batch; other layers stay in evaluation mode.

        Args:
            are_kept: Whether running statistics follow the batch, as in training.
        """
        layers = self.list_batch_norms()
        tracked = [layer.track_running_stats for layer in layers]
        for layer in layers:
            layer.training = True
            layer.track_running_stats = layer.track_running_stats and are_kept
        try:
            yield
        finally:
            for layer, was_tracked in zip(layers, tracked, strict=True):
                layer.training = False
                layer.track_running_stats = was_tracked

    def restore(self) -> None:
        """Bring the source weights back."""
        self.model.algorithm.load_state_dict(self.source)


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Take a step down a loss; return False where loss or weights are not finite: the source's have to come back."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return all(bool(torch.isfinite(value).all()) for value in (loss, *parameters))


def score_doubt(logits: Tensor) -> Tensor:
    """Return one minus the largest probability, [B], of logits, [B, K]: high for images from outside."""
    return 1 - F.softmax(logits.double(), dim=1).amax(1)
