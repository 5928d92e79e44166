"""OWTTT against the authors' code, and where a stream gives it little to go by."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from daft_domainbed.adaptation.alignment import RunningGaussian, measure_divergence
from daft_domainbed.adaptation.network import take_step
from daft_domainbed.adaptation.owttt import Owttt, Pool, Settings, choose_sure
from daft_domainbed.adaptation.prototypes import NearestPrototype
from daft_domainbed.adaptation.sources import SourceStatistics
from daft_domainbed.adaptation.threshold import AdaptiveThreshold
from tests.adaptation.conftest import D, K, check_stopped, make_images, make_network, wave

# Yushu-Li/OWTTT at 2e1a8ac, cifar/OURS.py: its loop as it stands, from `weak_prototype = ...` on, with 2048 replaced by
# the dimension, on the four batches of `make_images`; lr 0.0003, da_scale 1, ce_scale 0.2, delta 0.1.
AUTHORS: dict[str, Any] = {
    "predicted": [
        [0, 0, 0, 0, 0, 0, 2, 3],
        [0, 0, 0, 0, 0, 0, 3, 1],
        [0, 0, 0, 0, 0, 2, 0, 3],
        [0, 0, 0, 0, 0, 3, 2, 2],
    ],
    "scores": [
        0.10689,
        0.098234,
        0.101537,
        0.111919,
        0.112113,
        0.184523,
        0.096775,
        0.586825,
        0.126813,
        0.125176,
        0.136853,
        0.143174,
        0.133191,
        0.20695,
        0.508069,
        0.316445,
        0.125264,
        0.132956,
        0.142947,
        0.138313,
        0.127083,
        0.062686,
        0.22147,
        0.558588,
        0.112997,
        0.123255,
        0.124111,
        0.114083,
        0.109853,
        0.522474,
        0.204871,
        0.0643,
    ],
    "conv": [-0.005172, 0.4944, -0.134449, -0.468784, 0.243357, 0.402063],
    "bn": [0.98691, 1.19293, 0.946921, 0.812638, 1.092993, 1.153672],
    "mean": [0.157819, 0.01089, -0.179312, 0.094793, 0.135561, -0.166819],
    "ema": [1.17819, 1.02785, 0.363771, 0.680081, 1.267297, 0.794477],
    "memory": [
        [0.455247, -0.566999, 0.301339, 0.51264, -0.342163, 0.024131],
        [0.026677, -0.526541, 0.550014, 0.253308, -0.467868, 0.369409],
        [0.450161, -0.550918, 0.334853, 0.519001, -0.334695, 0.018297],
        [0.382115, -0.497919, 0.437237, 0.461934, -0.372938, 0.249845],
    ],
}


@pytest.mark.parametrize("most", [1, 100])
def test_a_stream_as_the_authors_meet_it(source: SourceStatistics, most: int) -> None:
    network = make_network()
    method, threshold = Owttt(network, source, Settings(lr=0.0003, most=most)), AdaptiveThreshold()
    predicted, scores = [], []
    for t in range(4):
        answers, score = method.answer(make_images(t))
        predicted.append(torch.where(score > threshold.update(score), K, answers).tolist())
        scores += score.tolist()
    encoder = network.model.algorithm.featurizer
    assert predicted == AUTHORS["predicted"]
    assert scores == pytest.approx(AUTHORS["scores"], abs=5e-6)
    assert encoder.conv.weight.flatten()[:6].tolist() == pytest.approx(AUTHORS["conv"], abs=5e-6)
    assert encoder.bn.weight.tolist() == pytest.approx(AUTHORS["bn"], abs=5e-6)
    assert encoder.bn.running_mean.tolist() == pytest.approx(AUTHORS["mean"], abs=5e-6)
    assert method.gaussian.mean.tolist() == pytest.approx(AUTHORS["ema"], abs=5e-6)
    memory = AUTHORS["memory"][-1:] if most == 1 else AUTHORS["memory"]  # a full pool loses its oldest
    assert method.pool.memory is not None
    torch.testing.assert_close(method.pool.memory, torch.tensor(memory), atol=5e-6, rtol=0)


def test_the_divergence_is_torchs() -> None:
    roots = [wave(D, D, phase=p) for p in (0.1, 1.3)]
    first, second = (MultivariateNormal(wave(D, phase=k), r @ r.T + torch.eye(D)) for k, r in enumerate(roots))
    found = measure_divergence(first.loc, first.covariance_matrix, second.loc, second.covariance_matrix)
    torch.testing.assert_close(found, kl_divergence(first, second) + kl_divergence(second, first), atol=1e-4, rtol=1e-4)


def test_the_running_gaussian_is_the_whole_streams_at_first(source: SourceStatistics) -> None:
    gaussian = RunningGaussian(source.mean, source.covariance)
    features = wave(40, D)
    for part in features.split(8):
        gaussian.update(part)
    torch.testing.assert_close(gaussian.mean, features.mean(0))
    torch.testing.assert_close(gaussian.covariance, torch.cov(features.T, correction=0), atol=1e-5, rtol=1e-4)


def test_the_sure_half() -> None:
    score = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.4, 0.5])
    seen, unseen = choose_sure(score, score < 0.6)
    assert seen.nonzero().flatten().tolist() == [1]  # of five: 5 // 2 - 1
    assert unseen.nonzero().flatten().tolist() == [0]  # of three: 3 // 2
    for threshold, n in ((1.0, (8, 0)), (0.0, (0, 8))):
        assert tuple(int(kind.sum()) for kind in choose_sure(score, score < threshold)) == n
    assert not any(kind.any() for kind in choose_sure(torch.tensor([0.1, 0.9]), torch.tensor([True, False])))


def test_the_pool_takes_what_is_new_and_forgets_the_oldest() -> None:
    pool = Pool(2)
    features = F.normalize(torch.tensor([[1.0, 0, 0], [1.0, 0.01, 0], [0, 1.0, 0], [0, 0, 1.0]]))
    assert pool.measure_similarity(features) is None
    pool.expand(features, torch.tensor([0.1, 0.11, 0.12, 0.9]), threshold=0.5, novelty=0.3)
    assert pool.memory is not None
    torch.testing.assert_close(pool.memory, features[[0, 2]])  # the second is like the first, the last is in a class
    pool.expand(features[3:], torch.tensor([0.2]), threshold=0.5, novelty=0.3)
    torch.testing.assert_close(pool.memory, features[[2, 3]])


# --- guards ------------------------------------------------------------------------------------------------------


def test_no_sample_selected_changes_nothing(source: SourceStatistics) -> None:
    network = make_network()
    method = Owttt(network, source)
    same = make_images(0)[:1].expand(4, -1, -1, -1)  # nothing separates equal scores: none is of a known class
    assert method.measure_loss(same) is None
    answers, _ = Owttt(make_network(), source).answer(same)
    assert answers.unique().numel() == 1
    for name, value in network.model.algorithm.state_dict().items():
        assert torch.equal(value, network.source[name])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_stream_shorter_than_a_batch(source: SourceStatistics, n: int) -> None:
    network = make_network()
    method = Owttt(network, source)
    for t in range(3):
        answers, scores = method.answer(make_images(t)[:n])
        assert len(answers) == len(scores) == n
    assert method.notice == ""
    assert all(value.isfinite().all() for value in network.model.algorithm.state_dict().values())


def test_one_seen_sample_is_not_enough_for_statistics(source: SourceStatistics) -> None:
    network = make_network()
    method = Owttt(network, source)
    x = make_images(0)
    score = 1 - (F.normalize(network.encode(x).detach()) @ source.prototypes.T).amax(1)
    order = score.argsort()
    method.measure_loss(x[order[[0, -1]]])
    assert method.gaussian.n == 0
    assert torch.equal(network.model.algorithm.featurizer.bn.running_mean, network.source["featurizer.bn.running_mean"])


def test_far_fewer_features_than_dimensions() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(wave(200, 108))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) @ self.weight.T

    mean, root = torch.zeros(200), wave(3, 200)
    source = SourceStatistics(F.normalize(wave(K, 200)), mean, root.T @ root / 3)
    network = make_network(Wide(), width=200)
    method = Owttt(network, source)
    for t in range(3):
        method.answer(make_images(t))
    assert method.notice == ""
    assert not torch.equal(network.model.algorithm.featurizer.weight, network.source["featurizer.weight"])


def test_a_model_without_batch_norm_adapts(source: SourceStatistics) -> None:
    network = make_network(nn.Sequential(nn.Conv2d(3, D, 6), nn.Flatten()))
    method = Owttt(network, source)
    for t in range(3):
        method.answer(make_images(t))
    assert method.notice == ""
    assert not torch.equal(network.model.algorithm.featurizer[0].weight, network.source["featurizer.0.weight"])


def test_an_update_that_is_not_finite_is_stopped(source: SourceStatistics) -> None:
    network = make_network()
    method = Owttt(network, source)
    method.answer(make_images(0))
    method.answer(make_images(1) * math.nan)
    check_stopped(network, method)
    before = {name: value.clone() for name, value in network.source.items()}
    method.answer(make_images(2))
    assert all(torch.equal(value, before[name]) for name, value in network.model.algorithm.state_dict().items())


def test_a_step_after_which_nothing_is_finite_is_stopped(source: SourceStatistics) -> None:
    network = make_network()
    method = Owttt(network, source, Settings(lr=1e30))  # the weights are finite, no longer the features
    found = method.answer(make_images(0))
    check_stopped(network, method)
    wanted = NearestPrototype(make_network(), source).answer(make_images(0))
    assert all(map(torch.equal, found, wanted))


def test_a_step_is_told_by_its_loss_and_its_weights() -> None:
    for loss_of, is_finite in ((lambda p: p.sum(), True), (lambda p: 100 * p.sum(), False), (lambda p: p / 0, False)):
        parameter = nn.Parameter(torch.ones(()))
        assert take_step(torch.optim.SGD([parameter], lr=1e37), loss_of(parameter), [parameter]) is is_finite
