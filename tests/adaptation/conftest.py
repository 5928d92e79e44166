from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.adaptation.network import Network
from daft_domainbed.adaptation.sources import SourceStatistics
from daft_domainbed.evaluation.pixel_model import PixelModel
from daft_domainbed.functional.input_spec import INPUT_SPECS

D, K = 6, 3


def wave(*shape: int, scale: float = 1.0, phase: float = 0.0) -> Tensor:
    """Fixed numbers between -scale and scale."""
    return scale * torch.sin(torch.arange(math.prod(shape)) * 1.7 + phase).reshape(shape)


class Encoder(nn.Module):
    """A convolution and batch norm, whose numbers are fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, D, 3, bias=False)
        self.bn = nn.BatchNorm2d(D)
        with torch.no_grad():
            self.conv.weight.copy_(wave(D, 3, 3, 3, scale=0.5))
            self.bn.weight.copy_(1 + wave(D, scale=0.2))
            self.bn.bias.copy_(wave(D, scale=0.3, phase=1.0))
            self.bn.running_mean.copy_(wave(D, scale=0.1, phase=2.0))
            self.bn.running_var.copy_(1 + wave(D, scale=0.3, phase=3.0))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        return F.softplus(out).mean((2, 3)) + out.mean((2, 3))


class Algorithm(nn.Module):
    """ERM's parts."""

    def __init__(self, featurizer: nn.Module, width: int = D) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.classifier = nn.Linear(width, K)
        with torch.no_grad():
            self.classifier.weight.copy_(wave(K, width, phase=0.4))
            self.classifier.bias.copy_(wave(K, scale=0.2))

    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.featurizer(x))
        return logits


def make_network(featurizer: nn.Module | None = None, width: int = D) -> Network:
    model = Algorithm(featurizer or Encoder(), width)
    return Network(PixelModel(model, INPUT_SPECS["unit"], torch.device("cpu")))


def make_images(t: int) -> Tensor:
    """Batch t, of eight images; the last three are of another kind."""
    x = wave(8, 3, 6, 6, phase=0.9 * t)
    x[5:] = 4.0 * torch.cos(torch.arange(3 * 3 * 6 * 6) * (0.05 + 0.02 * t)).reshape(3, 3, 6, 6)
    return x


def check_stopped(network: Network, method: Any) -> None:
    """Assert that a method has said that an update was not finite, and that the source weights are back."""
    assert "not finite" in method.notice
    for name, value in network.model.algorithm.state_dict().items():
        assert torch.equal(value, network.source[name])


@pytest.fixture
def source() -> SourceStatistics:
    root = wave(D, D, phase=0.7)
    prototypes = F.normalize(wave(K, D, phase=0.5) + 0.5)
    return SourceStatistics(prototypes, wave(D, scale=0.4, phase=0.2), root @ root.T / D)
