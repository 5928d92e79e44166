"""Adversarial training: each step against the simplest code that there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.functional.attacks import get_norms


def clone_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_equal(module: nn.Module, state: dict[str, Tensor]) -> bool:
    found = module.state_dict()
    return found.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in found.items())


def attack_by_hand(network: nn.Module, x: Tensor, start: Tensor, get_loss: Any, steps: int) -> Tensor:
    """Sign steps of 2/255 inside 8/255 of pixels in [0, 1], with batch norm in evaluation mode."""
    network.eval()
    low, high = (x - 8 / 255).clamp(0, 1), (x + 8 / 255).clamp(0, 1)
    x_adv = torch.maximum(torch.minimum(x + start, high), low)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (slope,) = torch.autograd.grad(get_loss(network(x_adv)), x_adv)
        x_adv = torch.maximum(torch.minimum(x_adv + 2 / 255 * slope.sign(), high), low)
    network.train()
    return x_adv.detach()


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_an_update_is_the_step_of_the_formula(bench: Any, loss: str) -> None:
    at, plain = bench.make("AT", at_loss=loss, at_steps=3), bench.make("ERM")
    assert is_equal(at, plain.state_dict())
    for model in (at.double(), plain.double()):  # the sign of a slope near 0 would magnify what is rounding
        model.optimizer = torch.optim.SGD(model.network.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)  # the seed that a workbench builds under
    for step in range(2):
        minibatches = [(x.double(), y) for x, y in bench.draw_minibatches(step)]
        x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
        if loss == "ce":
            start = 8 / 255 * (2 * torch.rand(x.shape, generator=generator) - 1)
            x_adv = attack_by_hand(plain.network, x, start, lambda z, y=y: F.cross_entropy(z, y), 3)
            value = F.cross_entropy(plain.network(x_adv), y)
        else:
            start = 0.001 * torch.randn(x.shape, generator=generator)
            clean = plain.eval().network(x).detach().softmax(1)
            x_adv = attack_by_hand(
                plain.network, x, start, lambda z, p=clean: (p * (p.log() - z.log_softmax(1))).sum(), 3
            )
            clean, attacked = plain.network(x).log_softmax(1), plain.network(x_adv).log_softmax(1)
            value = F.nll_loss(clean, y) + 6 * (clean.exp() * (clean - attacked)).sum(1).mean()
        plain.optimizer.zero_grad()
        value.backward()
        plain.optimizer.step()
        assert at.update(minibatches) == {"loss": pytest.approx(value.item(), rel=1e-9)}
    for name, wanted in plain.state_dict().items():
        torch.testing.assert_close(at.state_dict()[name], wanted)


def test_without_radius_it_is_erm_to_the_last_bit(bench: Any) -> None:
    at, plain = bench.make("AT", at_eps=0), bench.make("ERM")
    bench.train(at, 3)
    bench.train(plain, 3)
    assert is_equal(at, plain.state_dict())


@pytest.mark.parametrize(("norm", "radius"), [("linf", 8 / 255), ("l2", 0.5)])
@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_the_radius_is_each_samples_own_in_pixels(bench: Any, norm: str, radius: float, loss: str) -> None:
    at = bench.make("AT", at_norm=norm, at_loss=loss, at_steps=3)
    assert at.hparams["at_eps"] == radius
    x, y = bench.draw_minibatches(0)[0]
    norms = get_norms(at._attack(x, y) - x, norm).flatten()
    assert (norms <= radius + 1e-6).all()
    assert norms.max() > 0.5 * radius


def test_the_radius_does_not_depend_on_the_normalisation(bench: Any) -> None:
    at = bench.make("AT", pixels="imagenet", at_steps=2)
    x, y = bench.draw_minibatches(0)[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    moved = at._attack((x - mean) / std, y) * std + mean
    assert ((moved - x).abs() <= 8 / 255 + 1e-5).all()
    assert moved.min() >= -1e-5
    assert moved.max() <= 1 + 1e-5


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_an_attack_raises_the_loss_and_moves_no_statistics(bench: Any, loss: str) -> None:
    at = bench.make("AT", at_loss=loss)
    bench.train(at, 2)
    before = clone_state(at)
    x, y = bench.draw_minibatches(5)[0]
    x_adv = at._attack(x, y)
    assert is_equal(at, before)
    assert at.training
    at.eval()
    assert F.cross_entropy(at.predict(x_adv), y) > F.cross_entropy(at.predict(x), y)


@pytest.mark.parametrize(("loss", "passes"), [("ce", 3 + 1), ("trades", 1 + 3 + 2)])
def test_a_step_costs_its_attack_and_its_losses(bench: Any, loss: str, passes: int) -> None:
    at, counts = bench.make("AT", at_loss=loss, at_steps=3), []
    at.network.register_forward_hook(lambda *_: counts.append(1))
    bench.train(at, 1)
    assert len(counts) == passes


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_noise_without_a_box_is_trained_on_too(noise_bench: Any, loss: str) -> None:
    values = noise_bench.train(noise_bench.make("AT", at_loss=loss, at_steps=2), 2)
    assert all(torch.tensor(value["loss"]).isfinite() for value in values)
