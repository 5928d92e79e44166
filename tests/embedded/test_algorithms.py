from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.embedded import algorithms, networks
from daft_domainbed.embedded.hparams_registry import default_hparams, random_hparams
from daft_domainbed.errors import UsageError
from daft_domainbed.methods import list_ours

INPUT_SHAPE = (2, 28, 28)
HPARAMS = default_hparams("ERM", "ColoredMNIST")


def draw_minibatches(n_domains: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(size, *INPUT_SHAPE), torch.randint(0, 3, (size,))) for _ in range(n_domains)]


def test_erm_state_names_every_weight_twice() -> None:
    state = algorithms.ERM(INPUT_SHAPE, 3, 2, HPARAMS).state_dict()
    assert {name.split(".")[0] for name in state} == {"featurizer", "classifier", "network"}
    for name, value in state.items():
        alias = name.replace("network.0.", "featurizer.").replace("network.1.", "classifier.")
        assert state[alias] is value or state[alias].data_ptr() == value.data_ptr()
    assert len(state) == 2 * len({value.data_ptr() for value in state.values()})


def test_first_erm_step_is_adams_sign_step_on_the_pooled_cross_entropy() -> None:
    hparams = {**HPARAMS, "lr": 0.01}
    erm = algorithms.ERM(INPUT_SHAPE, 3, 2, hparams)
    minibatches = draw_minibatches(2)
    x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
    before = erm.classifier.weight.detach().clone()
    loss = F.nll_loss(erm.predict(x).log_softmax(1), y)
    (gradient,) = torch.autograd.grad(loss, erm.classifier.weight)
    assert erm.update(minibatches) == {"loss": pytest.approx(loss.item())}
    # With bias correction, Adam's first step is lr g / (|g| + 1e-8).
    torch.testing.assert_close(erm.classifier.weight, before - 0.01 * gradient / (gradient.abs() + 1e-8))


def test_erm_learns() -> None:
    erm = algorithms.ERM(INPUT_SHAPE, 3, 1, HPARAMS)
    y = torch.arange(9) % 3
    minibatches = [(torch.rand(9, *INPUT_SHAPE) * (1 + y.view(-1, 1, 1, 1)) / 3, y)]
    losses = [erm.update(minibatches)["loss"] for _ in range(15)]
    assert losses[-1] < losses[0] / 2


def test_erm_asks_the_module_for_its_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    featurizer = networks.MNIST_CNN(INPUT_SHAPE)
    monkeypatch.setattr(networks, "Featurizer", lambda input_shape, hparams: featurizer)
    assert algorithms.ERM(INPUT_SHAPE, 3, 2, HPARAMS).featurizer is featurizer


def test_get_algorithm_class(monkeypatch: pytest.MonkeyPatch) -> None:
    assert algorithms.get_algorithm_class("ERM") is algorithms.ERM
    plugged = type("Plugged", (algorithms.ERM,), {})
    monkeypatch.setattr(algorithms, "Plugged", plugged, raising=False)
    monkeypatch.setattr(algorithms, "ALGORITHMS", ["ERM", "Plugged"])
    assert algorithms.get_algorithm_class("Plugged") is plugged


@pytest.mark.parametrize(
    ("name", "answer"),
    [("IRM", "--host upstream"), ("EMR", "mean 'ERM'"), ("torch", "unknown algorithm 'torch'"), ("F", "'F'")],
)
def test_algorithms_that_are_not_here(name: str, answer: str) -> None:
    with pytest.raises(UsageError, match=answer):
        algorithms.get_algorithm_class(name)


def test_algorithm_leaves_its_methods_open() -> None:
    algorithm = algorithms.Algorithm(INPUT_SHAPE, 3, 2, HPARAMS)
    with pytest.raises(NotImplementedError):
        algorithm.update([])
    with pytest.raises(NotImplementedError):
        algorithm.predict(torch.zeros(1))


def test_names_left_to_upstream_are_upstreams(upstream: SimpleNamespace) -> None:
    assert {"ERM", *algorithms.UPSTREAM_ALGORITHMS} == {
        name for name in upstream.algorithms.ALGORITHMS if name not in list(list_ours())
    }


@pytest.mark.parametrize(
    ("input_shape", "hparams"),
    [
        (INPUT_SHAPE, HPARAMS),
        (INPUT_SHAPE, {**HPARAMS, "nonlinear_classifier": True}),
        ((3, 32, 32), random_hparams("ERM", "PACS", 1)),
    ],
)
def test_erm_training_equals_upstream(
    upstream: SimpleNamespace, input_shape: tuple[int, ...], hparams: dict[str, Any]
) -> None:
    losses, trained = [], []
    for host in (algorithms, upstream.algorithms):
        torch.manual_seed(5)
        erm = host.ERM(input_shape, 3, 2, hparams)
        minibatches = [(torch.rand(8, *input_shape), torch.randint(0, 3, (8,))) for _ in range(2)]
        losses.append([erm.update(minibatches)["loss"] for _ in range(3)])
        trained.append(erm)
    assert losses[0] == losses[1]
    ours, theirs = (erm.state_dict() for erm in trained)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (erm.optimizer.state_dict() for erm in trained)
    assert ours["param_groups"] == theirs["param_groups"]
    for i in theirs["state"]:
        assert all(torch.equal(ours["state"][i][key], theirs["state"][i][key]) for key in theirs["state"][i])
