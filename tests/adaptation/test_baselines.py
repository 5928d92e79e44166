"""BN, Tent and T3A against small implementations of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.adaptation.bn import BatchNormStatistics
from daft_domainbed.adaptation.prototypes import NearestPrototype
from daft_domainbed.adaptation.source import Source
from daft_domainbed.adaptation.sources import SourceStatistics, summarise
from daft_domainbed.adaptation.t3a import T3A
from daft_domainbed.adaptation.tent import Tent
from daft_domainbed.errors import UsageError
from tests.adaptation.conftest import Algorithm, Encoder, K, check_stopped, make_images, make_network, wave


def predict_by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits with the statistics of the batch, and batch norm's scale and shift given."""
    model = Algorithm(Encoder())
    out = F.conv2d(x, model.featurizer.conv.weight.detach())
    centred = out - out.mean((0, 2, 3), keepdim=True)
    scale = (out.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    out = centred / scale * weight[:, None, None] + bias[:, None, None]
    features = torch.log1p(out.exp()).mean((2, 3)) + out.mean((2, 3))
    return features @ model.classifier.weight.detach().T + model.classifier.bias.detach()


def test_source_and_prototypes_do_not_adapt(source: SourceStatistics) -> None:
    x = make_images(0)
    model = Algorithm(Encoder()).eval()
    with torch.no_grad():
        probabilities = model.predict(x).softmax(1)
        features = model.featurizer(x)
    for _ in range(2):
        answers, scores = Source(make_network(), source).answer(x)
        assert answers.tolist() == probabilities.argmax(1).tolist()
        torch.testing.assert_close(scores.float(), 1 - probabilities.amax(1))
    answers, scores = NearestPrototype(make_network(), source).answer(x)
    cosines = torch.stack([F.cosine_similarity(features, prototype[None]) for prototype in source.prototypes], 1)
    assert answers.tolist() == cosines.argmax(1).tolist()
    torch.testing.assert_close(scores, 1 - cosines.amax(1))


def test_bn_takes_the_statistics_of_the_batch(source: SourceStatistics) -> None:
    network = make_network()
    method = BatchNormStatistics(network, source)
    bn = Encoder().bn
    for t in range(2):
        answers, scores = method.answer(make_images(t))
        logits = predict_by_hand(make_images(t), bn.weight.detach(), bn.bias.detach())
        assert answers.tolist() == logits.argmax(1).tolist()
        torch.testing.assert_close(scores.float(), 1 - logits.softmax(1).amax(1), atol=1e-5, rtol=0)
    assert torch.equal(network.model.algorithm.featurizer.bn.running_mean, bn.running_mean)


def test_tent_is_adam_on_the_entropy_of_scales_and_shifts(source: SourceStatistics) -> None:
    network = make_network()
    method = Tent(network, source)
    bn = Encoder().bn
    values = [bn.weight.detach().clone(), bn.bias.detach().clone()]
    moments = [[torch.zeros(6), torch.zeros(6)] for _ in values]
    for t in range(3):
        answers, _ = method.answer(make_images(t))
        leaves = [value.clone().requires_grad_() for value in values]
        logits = predict_by_hand(make_images(t), *leaves)
        assert answers.tolist() == logits.argmax(1).tolist()  # of before the step
        p = logits.softmax(1)
        gradients = torch.autograd.grad((-p * p.log()).sum(1).mean(), leaves)
        for k, gradient in enumerate(gradients):
            first, second = moments[k]
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient**2)
            values[k] -= 1e-3 * (first / (1 - 0.9 ** (t + 1))) / ((second / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
    found = network.model.algorithm.featurizer.bn
    torch.testing.assert_close(found.weight.detach(), values[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(found.bias.detach(), values[1], atol=2e-5, rtol=0)
    assert torch.equal(network.model.algorithm.classifier.weight, Algorithm(Encoder()).classifier.weight)


@pytest.mark.parametrize("most", [2, 100])
def test_t3a_by_hand(source: SourceStatistics, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("daft_domainbed.adaptation.t3a.MOST", most)
    method = T3A(make_network(), source)
    model = Algorithm(Encoder()).eval()
    weight, bias = (p.detach().double().numpy() for p in model.classifier.parameters())

    def judge(z: np.ndarray) -> tuple[int, float]:
        logits = weight @ z + bias
        p = np.exp(logits - logits.max())
        p /= p.sum()
        return int(logits.argmax()), float(-(p * np.log(p)).sum())

    supports = [(*judge(row), row) for row in weight]
    for t in range(3):
        with torch.no_grad():
            z = model.featurizer(make_images(t)).double().numpy()
        supports += [(*judge(row), row) for row in z]
        kept = []
        for label in range(K):
            own = sorted((s for s in supports if s[0] == label), key=lambda s: s[1])
            kept += own[:most]
        supports = kept
        logits = np.full((len(z), K), -math.inf)
        for label in range(K):
            own = [row / np.linalg.norm(row) for name, _, row in supports if name == label]
            total = np.sum(own, axis=0) if own else np.zeros(6)
            logits[:, label] = z @ (total / max(np.linalg.norm(total), 1e-12))
        answers, scores = method.answer(make_images(t))
        assert answers.tolist() == logits.argmax(1).tolist()
        p = np.exp(logits - logits.max(1, keepdims=True))
        np.testing.assert_allclose(scores.numpy(), 1 - (p / p.sum(1, keepdims=True)).max(1), atol=1e-5)


# --- guards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BatchNormStatistics, Tent])
def test_one_image_is_answered_with_the_sources_statistics(kind: type, source: SourceStatistics) -> None:
    network = make_network()
    answers, scores = kind(network, source).answer(make_images(0)[:1])
    wanted, doubt = Source(make_network(), source).answer(make_images(0)[:1])
    assert (answers.tolist(), scores.tolist()) == (wanted.tolist(), doubt.tolist())
    for name, value in network.model.algorithm.state_dict().items():
        assert torch.equal(value, network.source[name])


class Plain(nn.Module):
    """An encoder without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(wave(6, 108))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


@pytest.mark.parametrize("kind", [BatchNormStatistics, Tent])
def test_without_batch_norm_it_answers_as_source_and_says_so(kind: type, source: SourceStatistics) -> None:
    method = kind(make_network(Plain()), source)
    answers, scores = method.answer(make_images(0))
    wanted, doubt = Source(make_network(Plain()), source).answer(make_images(0))
    assert (answers.tolist(), scores.tolist()) == (wanted.tolist(), doubt.tolist())
    assert "no batch norm" in method.notice


def test_tent_stops_where_an_update_is_not_finite(source: SourceStatistics) -> None:
    network = make_network()
    method = Tent(network, source)
    method.answer(make_images(0))
    method.answer(make_images(1) * math.inf)
    check_stopped(network, method)
    method.answer(make_images(2))
    assert torch.equal(network.model.algorithm.featurizer.bn.weight, Encoder().bn.weight)


@pytest.mark.parametrize("head", [nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), nn.Linear(6, 1)])
def test_t3a_needs_a_linear_head_with_a_row_a_class(source: SourceStatistics, head: nn.Module) -> None:
    network = make_network()
    network.model.algorithm.classifier = head
    with pytest.raises(UsageError, match="leave t3a out"):
        T3A(network, source)


def test_source_statistics_by_hand() -> None:
    features, y = wave(7, 4), torch.tensor([0, 0, 2, 2, 2, 0, 2])
    found = summarise(features, y, 3)
    torch.testing.assert_close(found.prototypes[0], F.normalize(features[[0, 1, 5]].mean(0), dim=0))
    assert found.prototypes[1].tolist() == [0, 0, 0, 0]  # nothing shows this class
    torch.testing.assert_close(found.covariance, torch.cov(features.T, correction=0))
    torch.testing.assert_close(found.mean, features.mean(0))
