from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from daft_domainbed.embedded.networks import MNIST_CNN, Wide_ResNet
from daft_domainbed.models.conditional import Condition, ConditionalNorm, FiLM, make_conditional
from daft_domainbed.models.resnet8 import ResNet8

# VITA-Group/Once-for-All-Adversarial-Training at 2615279: `FiLM_Layer(channels=2, in_channels=3)` of models/FiLM.py and
# `DualBN2d(2)(X, 1)` of models/DualBN.py, with these weights, features and codes.
FILM = {
    "hidden.weight": [[0.5, -0.3, 0.8], [0.1, 0.9, -0.7], [-0.6, 0.4, 0.2], [0.3, -0.8, 0.5]],
    "hidden.bias": [0.1, -0.2, 0.0, 0.3],
    "output.weight": [[0.4, -0.5, 0.2, 0.9], [-0.3, 0.7, 0.6, -0.1], [0.8, 0.2, -0.9, 0.3], [-0.2, -0.6, 0.1, 0.5]],
    "output.bias": [0.0, 0.1, -0.3, 0.2],
}
X = torch.tensor(
    [
        [1.0, -2.0, 0.5, 3.0, 0.0, 1.5, -1.0, 2.0],
        [2.0, 0.5, -0.5, 1.0, -3.0, 0.2, 0.4, -0.6],
        [0.7, 0.9, -1.1, 1.3, 0.3, -0.8, 2.2, -1.9],
    ]
).view(3, 2, 2, 2)
CODES = torch.tensor([[1.0, 0.5, -0.5], [-1.0, 0.2, 0.7], [0.3, -0.9, 1.2]])
MODULATED = [
    [-0.00447100, 0.00547250, -0.00281375, -0.01110000, -0.00230750, 0.85576749, -0.57435745, 1.14179242],
    [0.74707776, 0.18000278, -0.19804719, 0.36902776, -1.25553012, 0.46840602, 0.57615203, 0.03742200],
    [2.89371014, 3.32160997, -0.95739031, 4.17741013, 0.76803136, 0.77385634, 0.75797009, 0.77968127],
]
NORMALISED = [
    [0.35267007, -1.66869056, 0.01577663, 1.70024383, -0.51931244, 0.48703745, -1.19021237, 0.82248741],
    [0.55813801, -0.25415271, -0.79567987, 0.01661086, -2.33989382, 0.90920627, 1.11227500, 0.09693124],
    [-0.14584729, -0.03754187, -1.12059617, 0.17906898, 1.01074064, -0.10613750, 2.93989396, -1.22301567],
]


def make_condition(choices: list[int], n_first: int, codes: Tensor = CODES) -> Condition:
    condition = Condition()
    condition.set(codes, torch.tensor(choices), n_first)
    return condition


# --- layers ----------------------------------------------------------------------------------------------------------


def test_modulation_is_the_authors_beside_the_features_themselves() -> None:
    film = FiLM(channels=2, code_size=3)
    film.load_state_dict({name: torch.tensor(value) for name, value in FILM.items()})
    found = film(X, make_condition([0, 1, 2], 0)) - X  # theirs has no 1 beside the scale
    torch.testing.assert_close(found, torch.tensor(MODULATED).view_as(X), atol=1e-5, rtol=0)


def test_each_sample_is_modulated_by_its_choice() -> None:
    film = FiLM(channels=2, code_size=3)
    film.load_state_dict({name: torch.tensor(value) for name, value in FILM.items()})
    straight, mixed = film(X, make_condition([0, 1, 2], 0)), film(X.flip(0), make_condition([2, 1, 0], 0))
    torch.testing.assert_close(mixed.flip(0), straight)
    assert not torch.allclose(film(X, make_condition([1, 1, 1], 0)), straight)


def test_two_sets_of_batch_norm_are_the_authors() -> None:
    layer = ConditionalNorm(nn.BatchNorm2d(2), 3, make_condition([0, 1, 1], 1), is_dual=True)
    layer.first.load_state_dict({"weight": torch.tensor([1.2, 0.8]), "bias": torch.tensor([0.1, -0.1])}, strict=False)
    layer.second.load_state_dict({"weight": torch.tensor([0.5, 1.5]), "bias": torch.tensor([-0.2, 0.3])}, strict=False)
    torch.testing.assert_close(layer(X), torch.tensor(NORMALISED).view_as(X), atol=1e-5, rtol=0)
    assert layer.first.running_mean.tolist() == pytest.approx([0.0625, 0.0625])
    assert layer.second.running_mean.tolist() == pytest.approx([0.06, -0.04])
    assert layer.second.running_var.tolist() == pytest.approx([0.99742854, 1.14942861])


@pytest.mark.parametrize(("n_first", "moved"), [(0, "second"), (3, "first")])
def test_a_batch_of_one_kind_moves_one_set_alone(n_first: int, moved: str) -> None:
    layer = ConditionalNorm(nn.BatchNorm2d(2), 3, make_condition([0, 1, 2], n_first), is_dual=True)
    layer(X)
    assert {name for name in ("first", "second") if getattr(layer, name).num_batches_tracked} == {moved}


def test_activations_inside_a_norm_come_after_the_modulation() -> None:
    class NormAct(nn.BatchNorm2d):  # as timm's
        def __init__(self) -> None:
            super().__init__(2)
            self.drop, self.act = nn.Identity(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.drop(super().forward(x)))

    norm, plain = NormAct(), nn.BatchNorm2d(2)
    layer = ConditionalNorm(norm, 3, make_condition([0, 1, 2], 0), is_dual=False)
    assert torch.equal(layer(X), plain(X).relu())
    layer.film.output.bias.data[2:] = 10.0  # lifts all features above zero, if it comes first
    assert (layer(X) > 0).all()


# --- networks --------------------------------------------------------------------------------------------------------


def list_networks() -> dict[str, tuple[nn.Module, tuple[int, ...], int]]:
    return {
        "resnet8": (ResNet8(3, 2), (3, 32, 32), 10),
        "mnist_cnn": (MNIST_CNN((1, 28, 28)), (1, 28, 28), 4),
        "wide_resnet": (Wide_ResNet((3, 32, 32)), (3, 32, 32), 13),
        "resnet18": (torchvision.models.resnet18(num_classes=3), (3, 32, 32), 20),
    }


@pytest.mark.parametrize("is_dual", [False, True])
@pytest.mark.parametrize("name", list_networks())
def test_a_network_goes_on_to_compute_what_it_did(name: str, is_dual: bool) -> None:
    torch.manual_seed(0)
    network, shape, n_norms = list_networks()[name]
    x = torch.rand(4, *shape)
    network(x)  # statistics that are not at their start
    original, condition = copy.deepcopy(network), Condition()
    assert make_conditional(network, condition, 3, is_dual) == n_norms
    for n_first in (0, 4):
        condition.set(CODES, torch.tensor([0, 1, 2, 0]), n_first)
        for part in (network, original):
            part.eval()
        assert torch.equal(network(x), original(x))
    gradients = [
        torch.autograd.grad(part.train()(x).square().sum(), next(part.parameters()))[0] for part in (network, original)
    ]
    torch.testing.assert_close(*gradients)


def test_what_it_learns_depends_on_the_choice() -> None:
    torch.manual_seed(0)
    network, condition = ResNet8(3, 2), Condition()
    make_conditional(network, condition, 3, is_dual=False)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    x, choices = torch.rand(1, 3, 16, 16).expand(8, -1, -1, -1), torch.tensor([0, 1] * 4)
    for _ in range(60):
        condition.set(CODES, choices, 0)
        loss = (network(x).mean(dim=1) - choices).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05  # one image, two answers


def test_a_network_without_norms_has_none_replaced() -> None:
    network: Any = nn.Sequential(nn.Conv2d(3, 2, 3), nn.LayerNorm(3))
    assert make_conditional(network, Condition(), 3, is_dual=True) == 0
