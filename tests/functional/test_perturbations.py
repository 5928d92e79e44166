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
from daft_domainbed.functional.perturbations import (
    bound_negative_entropy,
    place_perturbation,
    sample_perturbation,
    search_distribution,
)

seeds = st.integers(0, 2**32 - 1)
UNIT = INPUT_SPECS["unit"]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the authors' numbers ------------------------------------------------------------------------------------------

# dongyp13/Adversarial-Distributional-Training at be5464a: `adt_loss(model, X, Y, ..., learning_rate=0.3, epsilon=0.1,
# perturb_steps=1, num_samples=2, lbd)` of adt_exp.py, `generate_pert(PHI, True)` of adt_expam.py, and lines 138 and 139
# of adt_impam.py, with the noise below in the place of `torch.randn_like`.
WEIGHT = torch.tensor([[3.0, -2.0, 1.0], [-1.0, 4.0, -3.0], [2.0, 0.5, -2.5]])
BIAS = torch.tensor([0.1, -0.2, 0.3])
X = torch.tensor([[0.2, 0.98, 0.5], [0.7, 0.01, 0.4]]).view(2, 1, 1, 3)
Y = torch.tensor([0, 2])
NOISE = [
    [0.5, -1.2, 0.3, 1.0, -0.4, 0.8],
    [-0.7, 0.2, 1.1, -0.9, 0.6, -0.1],
    [0.1, 0.9, -0.5, 0.4, -1.3, 0.2],
]
EXPLICIT = {
    0.0: (2.44949818, [0.17886688, 1.0, 0.44793889, 0.74790436, 0.0, 0.44389030]),
    0.01: (2.44949818, [0.17886688, 1.0, 0.44793889, 0.74790436, 0.0, 0.44389030]),
    5.0: (2.35557699, [0.17886688, 1.0, 0.43786645, 0.70417178, 0.0, 0.38715839]),
}
PHI = torch.tensor(
    [
        [0.3, -0.8, 0.1, 0.9, 0.2, -0.4, 0.6, -1.0, 0.5, 0.0, -0.2, 0.7],
        [-0.5, 0.4, 1.2, -0.3, 0.0, 0.8, -0.6, 0.1, 0.9, -0.1, 0.3, -1.5],
    ]
)
PHI_NOISE = torch.tensor([0.5, -1.2, 0.3, 1.0, -0.4, 0.8, -0.7, 0.2, 1.1, -0.9, 0.6, -0.1])
AMORTISED = [
    0.49074295, -0.95586079, 0.49221909, 0.89655071, -0.07710552, 0.49062300,
    0.28559044, -0.69165444, 0.95316333, -0.52263421, 0.30281255, 0.59142750,
]  # fmt: skip
ENTROPY = -0.83300346
CODES = torch.tensor([[0.4, -0.9, 0.1], [0.8, 0.3, -0.5]])
READ = torch.tensor([[0.2, -0.5, 0.3, 0.6, -1.0, 0.1], [0.7, 0.0, -0.9, -0.3, 0.5, 2.0]])
BOUND = 0.87794465


def model(x: Tensor) -> Tensor:
    return F.linear(torch.tanh(2 * x.flatten(1)), WEIGHT, BIAS)


@pytest.mark.parametrize("weight", EXPLICIT)
def test_the_explicit_family_is_the_authors(weight: float) -> None:
    noise = iter([torch.tensor(values).view_as(X) for values in NOISE])
    mean, spread = search_distribution(
        lambda x: F.cross_entropy(model(x), Y, reduction="sum"),
        X,
        lambda: next(noise),
        eps=0.1,
        entropy_weight=weight,
        steps=1,
        samples=2,
        rate=0.3,
        spec=UNIT,
    )
    unit, _ = sample_perturbation(mean, spread, next(noise))
    x_adv = place_perturbation(X, unit, 0.1, UNIT)
    loss, points = EXPLICIT[weight]
    torch.testing.assert_close(x_adv.flatten(), torch.tensor(points), atol=1e-5, rtol=0)
    assert F.cross_entropy(model(x_adv), Y).item() == pytest.approx(loss, abs=1e-5)


def test_samples_and_entropy_are_the_authors() -> None:
    unit, surprise = sample_perturbation(PHI[0], PHI[1], PHI_NOISE)
    torch.testing.assert_close(unit, torch.tensor(AMORTISED), atol=1e-5, rtol=0)
    assert surprise.mean().item() == pytest.approx(ENTROPY, abs=1e-5)


def test_the_bound_is_the_authors() -> None:
    assert bound_negative_entropy(CODES, *READ.chunk(2, dim=1)).item() == pytest.approx(BOUND, abs=1e-5)


# --- distributions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 0.0), (0.7, -1.0), (-0.3, 0.5)])
def test_the_density_integrates_to_one(mean: float, spread: float) -> None:
    deviation = math.log1p(math.exp(spread))
    a = torch.linspace(-1 + 1e-5, 1 - 1e-5, 200_001, dtype=torch.float64)
    noise = (torch.atanh(a) - mean) / deviation
    found, surprise = sample_perturbation(torch.full_like(a, mean), torch.full_like(a, spread), noise)
    torch.testing.assert_close(found, a)
    density = torch.exp(-surprise) / math.sqrt(2 * math.pi)
    assert torch.trapezoid(density, a).item() == pytest.approx(1, abs=1e-3)


@given(seeds)
def test_a_normal_is_scored_by_its_density(seed: int) -> None:
    codes, mean, spread = draw(seed, 3, 4, 5).unbind()
    normal = torch.distributions.Normal(mean, F.softplus(spread).sqrt())
    expected = -normal.log_prob(codes).mean()
    torch.testing.assert_close(bound_negative_entropy(codes, mean, spread), expected, atol=1e-4, rtol=1e-5)


@given(seeds, st.sampled_from(sorted(INPUT_SPECS)), st.floats(0, 1))
def test_perturbations_never_leave_ball_or_box(seed: int, name: str, eps: float) -> None:
    spec = INPUT_SPECS[name]
    mean, spread, noise = 5 * draw(seed, 3, 2, 3, 4, 4)
    unit, surprise = sample_perturbation(mean, spread, noise)
    pixels = draw(seed + 1, 2, 3, 4, 4).sigmoid().round(decimals=1)
    std, shift = spec.get_std(pixels), spec.get_mean(pixels)
    placed = place_perturbation((pixels - shift) / std, unit, eps, spec) * std + shift
    assert surprise.isfinite().all()
    assert (placed - pixels).abs().max() <= eps + 1e-9
    if spec.has_box:
        assert placed.min() >= -1e-9
        assert placed.max() <= 1 + 1e-9


def test_entropy_pulls_the_mean_inside_and_the_spread_apart() -> None:
    mean, spread = torch.tensor([1.0, -1.0]).requires_grad_(), torch.tensor([-3.0, -3.0]).requires_grad_()
    _, surprise = sample_perturbation(mean, spread, torch.tensor([0.5, -0.5]))
    pulls = torch.autograd.grad(surprise.mean(), [mean, spread])
    assert pulls[0][0] < 0 < pulls[0][1]
    assert (pulls[1] > 0).all()


# --- the search --------------------------------------------------------------------------------------------------


class Bench:
    """A smooth network in double precision, images away from the box's walls, and a search among them."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 4)).double()
            self.x = 0.2 + 0.6 * torch.rand(5, 3, 4, 4, dtype=torch.float64)
        self.y = torch.tensor([0, 1, 2, 3, 0])

    def measure(self, x: Tensor) -> Tensor:
        return F.cross_entropy(10 * self.network(x), self.y, reduction="sum")

    def search(self, **changed: float) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        options = {"eps": 0.1, "entropy_weight": 0.0, "steps": 7, "samples": 2, "rate": 0.3, **changed}
        return search_distribution(
            self.measure, self.x, lambda: torch.randn(self.x.shape, generator=generator).double(), spec=UNIT, **options
        )


def test_without_entropy_and_spread_a_step_is_a_step_of_pgd() -> None:
    bench = Bench()
    mean, spread = bench.search(steps=1, samples=1, spread=-40.0)
    unit, _ = sample_perturbation(mean, spread, torch.ones_like(mean))
    pgd = run_pgd(bench.measure, bench.x, eps=0.1, norm="linf", steps=1, step_size=0.1 * math.tanh(0.3), spec=UNIT)
    torch.testing.assert_close(place_perturbation(bench.x, unit, 0.1, UNIT), pgd, atol=1e-4, rtol=0)


def test_without_entropy_and_spread_the_search_gains_what_pgd_gains() -> None:
    bench = Bench()
    mean, _ = bench.search(spread=-40.0)
    found = bench.measure(place_perturbation(bench.x, torch.tanh(mean), 0.1, UNIT))
    pgd = bench.measure(run_pgd(bench.measure, bench.x, eps=0.1, norm="linf", steps=7, spec=UNIT))
    clean = bench.measure(bench.x)
    assert found - clean > 0.9 * (pgd - clean) > 0


def test_the_heavier_the_entropy_the_wider_the_distribution_and_the_nearer_its_mean() -> None:
    bench = Bench()
    spreads, means = [], []
    for weight in (0.0, 10.0, 1000.0):
        mean, spread = bench.search(entropy_weight=weight)
        spreads.append(F.softplus(spread).mean().item())
        means.append(mean.abs().mean().item())
    assert spreads == sorted(spreads)
    assert spreads[-1] > spreads[0] + 0.3
    assert means == sorted(means, reverse=True)


def test_a_distribution_does_not_depend_on_its_batch() -> None:
    bench = Bench()
    noise = draw(3, 14, *bench.x.shape)
    options = {"eps": 0.1, "entropy_weight": 0.01, "steps": 7, "samples": 2, "rate": 0.3, "spec": UNIT}

    def search(part: slice) -> tuple[Tensor, Tensor]:
        draws = iter(noise[:, part])
        y = bench.y[part]
        return search_distribution(
            lambda x: F.cross_entropy(bench.network(x), y, reduction="sum"),
            bench.x[part],
            lambda: next(draws),
            **options,
        )

    for together, alone in zip(search(slice(None)), search(slice(1, 2)), strict=True):
        torch.testing.assert_close(together[1:2], alone)
