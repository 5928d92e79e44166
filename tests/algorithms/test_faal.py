from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from daft_domainbed.algorithms import faal
from daft_domainbed.functional.class_weights import choose_sample_weights, get_margins
from daft_domainbed.functional.robust import kl_divergence
from tests.algorithms.by_hand import count_images, draw_minibatches, is_equal, make, make_teacher, train

OPTIMIZER = {"lr": 1e-2, "weight_decay": 1e-3}


@pytest.fixture(scope="module")
def start() -> Any:
    """An adversarially trained network, after a few steps, so that batch norm is not at its start."""
    at = make("AT", lr=1e-2, at_steps=2)
    train(at, 4)
    return at


@pytest.fixture
def make_faal(start: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes FAAL from that start."""
    monkeypatch.setattr(faal, "take_teacher", lambda: make_teacher(start))
    return lambda **hparams: make("FAAL", at_steps=2, **{**OPTIMIZER, **hparams})


def test_it_starts_as_its_teacher(make_faal: Any, start: Any) -> None:
    algorithm = make_faal()
    assert is_equal(algorithm, start)
    assert algorithm.hparams["backbone"] == "resnet8_w2"
    assert algorithm.hparams["at_eps"] == pytest.approx(8 / 255)


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_without_radius_it_goes_on_as_its_teacher_would(make_faal: Any, start: Any, loss: str) -> None:
    algorithm = make_faal(at_loss=loss, faal_radius=0.0)
    at = make("AT", at_loss=loss, at_steps=2, **OPTIMIZER)
    at.network.load_state_dict(start.network.state_dict())
    assert [losses["loss"] for losses in train(algorithm, 3)] == pytest.approx([x["loss"] for x in train(at, 3)])
    for name, value in at.network.state_dict().items():
        torch.testing.assert_close(algorithm.network.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("loss", ["ce", "trades"])
@pytest.mark.parametrize("gain", ["mean", "sum"])
def test_a_step_weighs_each_sample_by_its_class(make_faal: Any, loss: str, gain: str) -> None:
    algorithm = make_faal(at_loss=loss, faal_gain=gain, faal_radius=1.0)
    twin = copy.deepcopy(algorithm)
    x, y = (torch.cat(parts) for parts in zip(*draw_minibatches(0), strict=True))
    x_adv = twin._attack(x, y)
    clean = twin.predict(x) if loss == "trades" else None
    logits = twin.predict(x_adv)
    losses = F.cross_entropy(logits, y, reduction="none")
    if clean is not None:
        losses = F.cross_entropy(clean, y, reduction="none") + 6 * kl_divergence(clean, logits)
    weights = choose_sample_weights(get_margins(logits, y), y, 1.0, by=gain)
    twin.optimizer.zero_grad()
    (weights * losses).mean().backward()
    twin.optimizer.step()
    (found,) = train(algorithm, 1)
    assert found["loss"] == pytest.approx((weights * losses).mean().item())
    assert found["plain_loss"] == pytest.approx(losses.mean().item())
    assert found["largest_weight"] == pytest.approx(weights.max().item())
    assert found["largest_weight"] > 1.5
    assert is_equal(algorithm.network, twin.network)


@pytest.mark.parametrize(
    ("hparams", "passes"),
    [
        ({}, 2 + 1),
        ({"faal_awp": 0.01}, 2 + 1 + 1),
        ({"at_loss": "trades"}, 1 + 2 + 2),
        ({"at_loss": "trades", "faal_awp": 0.01}, 1 + 2 + 2 + 2),
    ],
)
def test_a_step_costs_its_attack_and_its_losses(make_faal: Any, hparams: dict[str, Any], passes: int) -> None:
    assert count_images(make_faal(**hparams)) == passes * 18


# --- perturbed weights -----------------------------------------------------------------------------------------------

# TrustAI/FAAL at b20ee9d, `ModelAWP(..., SGD(lr=0.1), gamma=0.005).calc_awp_at` and `.calc_awp_trades(beta=6)` of
# utils_awp.py, times gamma: what is added to the weights of a small network for three inputs under attack.
NETWORK = {
    "0.weight": [[0.5, -1.0], [1.5, 0.2], [-0.7, 0.8]],
    "0.bias": [0.1, 0.0, -0.2],
    "2.weight": [[1.0, -0.5, 0.3], [0.2, 0.8, -1.1], [-0.6, 0.4, 0.9]],
    "2.bias": [0.0, 0.3, -0.1],
}
X = torch.tensor([[0.3, -0.2], [1.0, 0.5], [-0.4, 0.9]])
X_ADV = X + torch.tensor([[0.1, 0.1], [-0.1, 0.1], [0.1, -0.1]])
ASCENTS = {
    "ce": {
        "0.weight": [[-0.00677210, 0.00386593], [0.00528994, -0.00340187], [0.00364594, 0.00175904]],
        "2.weight": [
            [-0.00497912, -0.00429097, 0.00542333],
            [0.00192684, 0.00086200, -0.00195434],
            [0.00305228, 0.00342898, -0.00346898],
        ],
    },
    "trades": {
        "0.weight": [[-0.00534946, 0.00399169], [0.00486720, -0.00464546], [0.00429740, 0.00290898]],
        "2.weight": [
            [-0.00527801, -0.00362960, 0.00556190],
            [0.00231716, 0.00022295, -0.00215826],
            [0.00296084, 0.00340666, -0.00340366],
        ],
    },
}


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_perturbed_weights_are_the_authors(make_faal: Any, loss: str) -> None:
    algorithm = make_faal(at_loss=loss, faal_awp=0.005)
    algorithm.network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))
    algorithm.network.load_state_dict({name: torch.tensor(value) for name, value in NETWORK.items()})
    found = algorithm._find_ascent(X, X_ADV, torch.tensor([0, 1, 2]))
    assert found.keys() == ASCENTS[loss].keys()
    for name, value in ASCENTS[loss].items():
        torch.testing.assert_close(found[name], torch.tensor(value), atol=1e-5, rtol=0)


def test_what_awp_tries_moves_no_statistics(make_faal: Any) -> None:
    algorithm = make_faal(faal_awp=0.1)
    before = copy.deepcopy(algorithm.network)
    x, y = (torch.cat(parts) for parts in zip(*draw_minibatches(0), strict=True))
    ascent = algorithm._find_ascent(x, x, y)
    assert is_equal(algorithm.network, before)
    assert all(parameter.grad is None for parameter in algorithm.network.parameters())
    assert {name for name, w in before.named_parameters() if w.dim() > 1} == ascent.keys()
    for name, step in ascent.items():
        assert step.norm().item() == pytest.approx(0.1 * before.get_parameter(name).norm().item(), rel=1e-4)


def test_perturbed_weights_come_back_after_the_step(make_faal: Any) -> None:
    algorithm = make_faal(faal_awp=0.1, lr=1e-12, weight_decay=0.0)
    before = {name: value.clone() for name, value in algorithm.network.named_parameters()}
    (found,) = train(algorithm, 1)
    for name, value in algorithm.network.named_parameters():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-6, msg=name)
    plain = make_faal(faal_awp=0.0, lr=1e-12)
    assert found["plain_loss"] > train(plain, 1)[0]["plain_loss"]  # the step was taken where the loss is worse
