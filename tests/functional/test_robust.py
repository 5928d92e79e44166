"""Losses of adversarial training: by hand, against plain formulas, and against the authors' own code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from daft_domainbed.functional.attacks import run_pgd
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.functional.losses import kd_loss
from daft_domainbed.functional.robust import (
    balance_temperatures,
    balance_weights,
    kl_divergence,
    measure_entropy,
    trades_loss,
)

shares = st.floats(0.01, 0.99)


def make_wave(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """The tensors on which the authors' code was run: sines of 0, 1, 2, ..."""
    return (scale * torch.sin(torch.arange(math.prod(shape), dtype=torch.float32) + shift)).view(shape)


# --- TRADES ----------------------------------------------------------------------------------------------------------


@given(p=shares, q=shares, beta=st.floats(0, 10))
def test_trades_of_two_classes_by_hand(p: float, q: float, beta: float) -> None:
    # A logit z against 0 has probability p = sigmoid(z), and d p / d z = p (1 - p).
    clean = torch.tensor([[math.log(p / (1 - p)), 0.0]], dtype=torch.float64, requires_grad=True)
    attacked = torch.tensor([[math.log(q / (1 - q)), 0.0]], dtype=torch.float64, requires_grad=True)
    loss = trades_loss(clean, attacked, torch.tensor([0]), beta)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert loss.item() == pytest.approx(-math.log(p) + beta * kl, rel=1e-9, abs=1e-9)
    loss.backward()
    clean_slope = -(1 - p) + beta * p * (1 - p) * (math.log(p / q) - math.log((1 - p) / (1 - q)))
    assert clean.grad[0, 0].item() == pytest.approx(clean_slope, rel=1e-6, abs=1e-9)
    assert attacked.grad[0, 0].item() == pytest.approx(beta * (q - p), rel=1e-6, abs=1e-9)


class FixedNet(nn.Module):
    """Three classes of 3 x 2 x 2 images, the weights sines."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(make_wave(3, 12, scale=0.5, shift=1.0))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.tanh(x.flatten(1) @ self.weight.T + make_wave(3, shift=2.0))


# yaodongyu/TRADES 6e8e11b, trades.py: trades_loss(net, x, y, optimizer, step_size=2/255, epsilon=8/255,
# perturb_steps=steps, beta=6.0), with torch.randn replaced by make_wave(..., shift=5.0): loss, and the sums over rows
# of the gradient of the weight.
TRADES = {
    0: (1.86179519, [0.68336385, -1.99153805, -0.75804746]),
    10: (1.87248445, [0.65641707, -2.01237798, -0.74387991]),
}


@pytest.mark.parametrize("steps", TRADES)
def test_trades_with_its_attack_agrees_with_the_authors_code(steps: int) -> None:
    net, labels = FixedNet(), torch.tensor([0, 1, 2, 1])
    x = 0.5 + 0.5 * make_wave(4, 3, 2, 2, shift=3.0)
    clean = net(x).detach()
    x_adv = run_pgd(
        lambda perturbed: kl_divergence(clean, net(perturbed)).sum(),
        x,
        eps=8 / 255,
        norm="linf",
        steps=steps,
        step_size=2 / 255,
        spec=INPUT_SPECS["unit"],
        start=0.001 * make_wave(4, 3, 2, 2, shift=5.0),
    )
    loss = trades_loss(net(x), net(x_adv), labels, beta=6.0)
    loss.backward()
    expected, rows = TRADES[steps]
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert net.weight.grad.sum(dim=1).tolist() == pytest.approx(rows, abs=1e-5)


# zhaoshiji123/MTARD 6480a1b, mtard/mtard_loss.py: mtard_inner_loss_ce(net, net, x, y, optimizer, step_size=2/255,
# epsilon=8/255, perturb_steps=10), with the same noise: the student's logits.
MTARD_LOGITS = [
    [0.17746939, -1.63986373, -1.94392955],
    [1.54147542, -0.92761397, -1.92145920],
    [1.91603100, 0.87583542, -1.67588949],
    [1.95551181, 1.61434531, -0.82924885],
]


def test_the_attack_on_labels_agrees_with_the_authors_code() -> None:
    net, labels = FixedNet(), torch.tensor([0, 1, 2, 1])
    x_adv = run_pgd(
        lambda perturbed: F.cross_entropy(net(perturbed), labels, reduction="sum"),
        0.5 + 0.5 * make_wave(4, 3, 2, 2, shift=3.0),
        eps=8 / 255,
        norm="linf",
        steps=10,
        step_size=2 / 255,
        spec=INPUT_SPECS["unit"],
        start=0.001 * make_wave(4, 3, 2, 2, shift=5.0),
    )
    torch.testing.assert_close(net(x_adv), torch.tensor(MTARD_LOGITS), atol=1e-5, rtol=0)


def test_divergence_is_that_of_distillation_at_temperature_one() -> None:
    p, q = make_wave(4, 3, shift=1.0), make_wave(4, 3, shift=2.0)
    assert kl_divergence(p, q).mean().item() == pytest.approx(kd_loss(q, p, temperature=1.0).item(), rel=1e-5)


# --- B-MTARD ---------------------------------------------------------------------------------------------------------

# zhaoshiji123/MTARD-extension 93506d6, resnet18_mtard_cifar10.py, lines 122 to 169 (its own rates, 0.001 and 0.025)
# executed four times on the logits below: both losses, both entropies, temperatures and weights after the step, total
# loss. The losses and entropies there are means over classes too, and the logarithms are of p + 1e-5.
BMTARD = [
    (0.13079365, 0.24950702, 0.19565336, 0.17094536, 1.000, 1.001, 0.50000000, 0.19015034),
    (0.02939622, 0.03020804, 0.22672240, 0.21411689, 1.000, 1.002, 0.50374764, 0.02979909),
    (0.08767062, 0.06186615, 0.32835701, 0.29409501, 1.000, 1.003, 0.50940325, 0.07501103),
    (0.13323972, 0.08768231, 0.21393205, 0.35897753, 1.001, 1.002, 0.51525593, 0.11115604),
]


def smooth(logits: Tensor) -> float:
    """What adding 1e-5 inside the authors' logarithms adds to their means over classes."""
    p = logits.softmax(1)
    return (p * torch.log1p(1e-5 / p)).mean().item()


def test_balances_agree_with_the_authors_code() -> None:
    temperatures, weight, first = (1.0, 1.0), 0.5, (0.0, 0.0)
    for t, expected in enumerate(BMTARD):
        students = make_wave(4, 3, shift=1.0 + t), make_wave(4, 3, shift=3.0 + 2 * t)
        teachers = make_wave(4, 3, scale=2.0, shift=2.0 + t), make_wave(4, 3, scale=6 / (1 + 2 * t), shift=4.0 + t)
        softened = [logits / tau for logits, tau in zip(teachers, temperatures, strict=True)]
        losses = [kl_divergence(p, q).mean().item() for p, q in zip(softened, students, strict=True)]
        entropies = [measure_entropy(logits).item() for logits in softened]
        for i in (0, 1):
            assert losses[i] / 3 + smooth(softened[i]) == pytest.approx(expected[i], abs=1e-6)
            assert entropies[i] / 3 - smooth(softened[i]) == pytest.approx(expected[2 + i], abs=1e-6)
        temperatures = balance_temperatures(temperatures, (entropies[0], entropies[1]), rate=0.001)
        assert temperatures == pytest.approx(expected[4:6], abs=1e-9)
        # The weights are compared with the authors' losses put in, whose smoothing would otherwise show.
        first = expected[:2] if t == 0 else first
        weight = balance_weights(weight, (expected[0] / first[0], expected[1] / first[1]), rate=0.025)
        assert weight == pytest.approx(expected[6], abs=1e-6)
        assert weight * expected[0] + (1 - weight) * expected[1] == pytest.approx(expected[7], abs=1e-6)


def test_entropies_meet_within_the_temperatures_travel() -> None:
    logits = make_wave(16, 8, shift=1.0), make_wave(16, 8, scale=4.0, shift=2.0)
    temperatures, rate = (1.0, 1.0), 0.02
    for _ in range(round(9 / rate)):
        entropies = [measure_entropy(z / tau).item() for z, tau in zip(logits, temperatures, strict=True)]
        temperatures = balance_temperatures(temperatures, (entropies[0], entropies[1]), rate)
    assert entropies[0] == pytest.approx(entropies[1], abs=0.02)
    assert temperatures[0] <= 1 + rate  # the softer teacher stays at its least
    # Entropies are equal where the logits' spreads are.
    assert temperatures[1] == pytest.approx(4, abs=0.2)


@given(a=st.floats(1, 10), b=st.floats(1, 10), h=shares, rate=st.floats(0, 20))
def test_temperatures_stay_inside_their_limits(a: float, b: float, h: float, rate: float) -> None:
    for temperature in balance_temperatures((a, b), (h, 0.5), rate):
        assert 1 <= temperature <= 10


def test_equal_entropies_leave_temperatures_alone() -> None:
    assert balance_temperatures((2.0, 3.0), (0.5, 0.5), rate=0.1) == (2.0, 3.0)


@given(weight=shares, a=st.floats(0, 5), b=st.floats(0, 5), rate=shares, beta=st.floats(0, 4))
def test_weights_follow_the_loss_that_fell_less(weight: float, a: float, b: float, rate: float, beta: float) -> None:
    new = balance_weights(weight, (a, b), rate, beta)
    assert 0 <= new <= 1
    # The rule is the same for the second loss, so the two weights go on summing to 1.
    assert new + balance_weights(1 - weight, (b, a), rate, beta) == pytest.approx(1)
    if a >= b and beta > 0:
        assert new >= min(weight, 0.5) - 1e-12


def test_losses_that_are_learnt_weigh_the_same() -> None:
    assert balance_weights(1.0, (0.0, 0.0), rate=1.0) == 0.5
