from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.evaluation import sanity
from daft_domainbed.evaluation.sanity import Signs


def draw_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).requires_grad_(False)


def draw_pixels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(9, 3, 2, 2, generator=generator), torch.randint(0, 3, (9,), generator=generator)


def name_flags(signs: Signs) -> list[str]:
    return [flag["flag"] for flag in sanity.find_flags(signs)]


def test_missing_gradients_are_counted() -> None:
    network, (x, y) = draw_network(), draw_pixels()
    assert sanity.count_zero_gradients(network, x, y) == 0
    assert sanity.count_zero_gradients(lambda x: network(x.detach()), x, y) == 9
    # The gradient of a loss that is zero in single precision: sure beyond its range, and right.
    answers = network(x).argmax(1)
    assert sanity.count_zero_gradients(lambda x: 1e6 * network(x), x, answers) == 9


def test_randomness_is_seen_and_rounding_is_not() -> None:
    network, (x, _) = draw_network(), draw_pixels()
    assert not sanity.is_random(network, x)
    assert not sanity.is_random(lambda x: network(x) + 1e-6 * torch.rand(9, 3), x)
    assert sanity.is_random(lambda x: network(x + 0.1 * torch.rand_like(x)), x)


def test_probabilities_are_seen_and_logits_are_none() -> None:
    logits = draw_network()(draw_pixels()[0])
    assert not sanity.are_probabilities(logits)
    assert not sanity.are_probabilities(F.log_softmax(logits, dim=1))
    assert sanity.are_probabilities(F.softmax(logits, dim=1))


def test_an_honest_model_has_no_flag() -> None:
    signs = Signs(n=100, n_zero_gradients=1, kept={"linf": 0.0}, white_box={"linf": 0.3}, black_box={"linf": 0.45})
    assert name_flags(signs) == []
    assert name_flags(Signs(n=100, kept={"l2": float("nan")}, black_box={"l2": float("nan")})) == []


def test_each_sign_has_its_flag() -> None:
    assert name_flags(Signs(n=100, is_random=True)) == ["randomness"]
    assert name_flags(Signs(n=100, are_probabilities=True)) == ["probabilities"]
    assert name_flags(Signs(n=100, n_zero_gradients=30)) == ["masked_gradients"]
    assert name_flags(Signs(n=100, kept={"l2": 0.4})) == ["robust_at_any_budget_l2"]
    assert name_flags(Signs(n=128, white_box={"linf": 51 / 128}, black_box={"linf": 47 / 128})) == []
    assert name_flags(Signs(n=128, white_box={"linf": 51 / 128}, black_box={"linf": 46 / 128})) != []
    beaten = Signs(n=100, white_box={"linf": 0.6}, black_box={"linf": 0.5})
    assert name_flags(beaten) == ["black_box_beats_white_box_linf"]
