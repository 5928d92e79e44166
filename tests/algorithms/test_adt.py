from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.functional.perturbations import (
    bound_negative_entropy,
    place_perturbation,
    sample_perturbation,
    search_distribution,
)
from daft_domainbed.testing import AlgorithmContract
from daft_domainbed.training import resume
from tests.algorithms.by_hand import draw_minibatches, is_equal, make, train

EPS = 8 / 255
UNIT = INPUT_SPECS["unit"]
FEW = {"adt_steps": 2, "adt_samples": 2, "adt_width": 4, "lr": 1e-2}
FAMILIES = ("explicit", "amortised", "implicit")
all_families = pytest.mark.parametrize("family", FAMILIES)


def concatenate(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (torch.cat(parts) for parts in zip(*draw_minibatches(seed), strict=True))
    return x, y


@pytest.mark.parametrize(("family", "weight"), [("explicit", 0.01), ("amortised", 0.01), ("implicit", 1.0)])
def test_radius_and_weight_are_resolved(family: str, weight: float) -> None:
    hparams = make("ADT", adt_family=family, adt_width=2).hparams
    assert (hparams["adt_eps"], hparams["adt_entropy"]) == (EPS, weight)
    assert make("ADT", adt_eps="auto*1/4", adt_entropy=0.5).hparams["adt_eps"] == EPS / 4


@all_families
def test_its_weights_are_erms(family: str) -> None:
    assert make("ADT", adt_family=family, adt_width=2).state_dict().keys() == make("ERM").state_dict().keys()


@all_families
def test_a_perturbation_never_leaves_the_ball(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = make("ADT", adt_family=family, **FEW)
    train(algorithm, 2)
    x, _ = concatenate(2)
    seen = []
    monkeypatch.setattr(algorithm, "predict", lambda z: (seen.append(z.detach()), algorithm.network(z))[1])
    train(algorithm, 1, first=2)
    assert len(seen) == {"explicit": 5, "amortised": 3, "implicit": 3}[family]  # and no pass more
    for z in seen:
        assert (z - x).abs().max() <= EPS + 1e-6
        assert z.min() >= 0
        assert z.max() <= 1
    assert (seen[-1] - x).abs().max() > EPS / 20


def test_an_explicit_step_is_the_formulas() -> None:
    algorithm = make("ADT", **FEW)
    train(algorithm, 2)
    twin = copy.deepcopy(algorithm)
    x, y = concatenate(2)
    seed = int(torch.randint(2**62, (), generator=twin.noise_generator))
    noise = torch.Generator().manual_seed(seed)
    twin.network.eval()
    mean, spread = search_distribution(
        lambda z: F.cross_entropy(twin.network(z), y, reduction="sum"),
        x,
        lambda: torch.randn(x.shape, generator=noise),
        eps=EPS,
        entropy_weight=0.01,
        steps=2,
        samples=2,
        rate=0.3,
        spec=UNIT,
    )
    twin.network.train()
    unit, surprise = sample_perturbation(mean, spread, torch.randn(x.shape, generator=noise))
    loss = F.cross_entropy(twin.network(place_perturbation(x, unit, EPS, UNIT)), y)
    twin.optimizer.zero_grad()
    loss.backward()
    twin.optimizer.step()
    (found,) = train(algorithm, 1, first=2)
    assert found == pytest.approx({"loss": loss.item(), "entropy": surprise.mean().item()})
    assert is_equal(algorithm.network, twin.network)


@pytest.mark.parametrize("family", ["amortised", "implicit"])
def test_generators_raise_the_loss_and_the_entropy_that_the_network_lowers(family: str) -> None:
    algorithm = make("ADT", adt_family=family, adt_entropy=0.7, adt_threshold=0.1, **FEW)
    train(algorithm, 2)
    twin = copy.deepcopy(algorithm)
    x, y = concatenate(2)
    noise = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=twin.noise_generator)))
    sight = twin._look(x, y)
    generator = twin.helpers["generator"]
    if family == "amortised":
        mean, spread = generator(sight).chunk(2, dim=1)
        unit, surprise = sample_perturbation(mean, spread, torch.randn(x.shape, generator=noise))
        gain = 0.7 * surprise.mean()
    else:
        codes = 2 * torch.rand(len(x), 64, generator=noise) - 1
        unit = torch.tanh(generator(sight, codes))
        gain = -0.7 * (bound_negative_entropy(codes, *twin.helpers["encoder"](unit)) - 0.1)
    loss = F.cross_entropy(twin.network(place_perturbation(x, unit, EPS, UNIT)), y)
    weights, helped = list(twin.network.parameters()), list(twin.helpers.networks.parameters())
    down = torch.autograd.grad(loss, weights, retain_graph=True)
    up = torch.autograd.grad(loss + gain, helped, allow_unused=True)

    twin_weights, twin_helped = list(algorithm.network.parameters()), list(algorithm.helpers.networks.parameters())
    train(algorithm, 1, first=2)  # leaves its gradients
    for found, expected in zip(twin_weights, down, strict=True):
        torch.testing.assert_close(found.grad, expected)
    for found, expected in zip(twin_helped, up, strict=True):
        torch.testing.assert_close(found.grad, -expected)


def test_generators_see_slopes_of_one_size() -> None:
    algorithm = make("ADT", adt_family="amortised", **FEW)
    x, y = concatenate(0)
    sight = algorithm._look(x, y)
    assert torch.equal(sight[:, :3], x)
    for part in (sight[:, 3:6], sight[:, 6:]):
        assert part.flatten(1).abs().amax(dim=1).tolist() == pytest.approx([1.0] * len(x))
    assert not torch.allclose(sight[:, 3:6], sight[:, 6:])


@all_families
def test_it_neither_moves_nor_needs_the_global_random_state(family: str) -> None:
    runs = []
    with torch.random.fork_rng(devices=[]):
        for global_seed in (0, 1):
            algorithm = make("ADT", adt_family=family, **FEW)
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            runs.append(train(algorithm, 2))
            assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1]


def test_all_that_changes_is_saved() -> None:
    assert resume.list_unsaved(make("ADT")) == []


@all_families
def test_it_can_be_copied_in_the_middle(family: str) -> None:
    algorithm = make("ADT", adt_family=family, **FEW)
    train(algorithm, 1)
    twin = copy.deepcopy(algorithm)
    assert train(algorithm, 2, first=1) == train(twin, 2, first=1)
    assert is_equal(algorithm, twin)


def test_a_generator_learns_to_harm_more_than_chance_does() -> None:
    algorithm = make("ADT", adt_family="amortised", adt_width=4, adt_generator_lr=2e-2, lr=1e-9)
    algorithm.classifier.weight.data.mul_(8)  # has something to lose
    x, y = concatenate(99)
    train(algorithm, 10)
    algorithm.network.eval()

    def measure(unit: Any) -> float:
        return F.cross_entropy(algorithm.network(place_perturbation(x, unit, EPS, UNIT)), y).item()

    unit, _, _ = algorithm._choose_perturbation(x, y)
    chance = torch.tanh(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 0.7)
    assert measure(unit) > measure(chance) + 0.01


class TestImplicitContract(AlgorithmContract):
    """The family with the most beside the network: a run goes on where it was, generator and encoder included."""

    algorithm = "ADT"
    dataset = "EmojiStyles"
    hparams: ClassVar[dict[str, Any]] = {"adt_family": "implicit", "adt_width": 2}
