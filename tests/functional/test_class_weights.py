"""The adversary over classes, against a general optimiser, the conditions of optimality, and FAAL's own code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daft_domainbed.functional.class_weights import choose_sample_weights, get_margins, solve_kl_ball

seeds = st.integers(0, 2**32 - 1)
radii = st.floats(1e-6, 5)
few_examples = settings(max_examples=40)


def draw_problem(seed: int) -> tuple[Tensor, float]:
    random = np.random.RandomState(seed % 2**32)
    gains = random.uniform(-1, 1, random.randint(2, 13)) * 10 ** random.uniform(-1, 1)
    return torch.tensor(gains), float(10 ** random.uniform(-2, 0.3))


def measure_kl(p: Tensor) -> float:
    return float(-(p * len(p)).log().mean())


def optimise_generally(gains: Tensor, radius: float) -> np.ndarray:
    """Solve the same problem by sequential quadratic programming, and polish the answer on Lagrange's conditions."""
    a, size = gains.numpy() / gains.abs().max().item(), len(gains)
    constraints = [
        {"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones(size)},
        {"type": "ineq", "fun": lambda p: radius + np.log(p * size).mean(), "jac": lambda p: 1 / (size * p)},
    ]
    rough = scipy.optimize.minimize(
        lambda p: -(p @ a),
        np.full(size, 1 / size),
        jac=lambda p: -a,
        bounds=[(1e-9, 1)] * size,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 1000},
    ).x

    def conditions(point: np.ndarray) -> np.ndarray:
        p, multiplier, level = point[:size], point[size], point[size + 1]
        return np.append(a + multiplier / (size * p) - level, [p.sum() - 1, radius + np.log(p * size).mean()])

    # The multipliers that fit the rough answer best.
    known = np.stack([1 / (size * rough), -np.ones(size)], axis=1)
    multipliers = np.linalg.lstsq(known, -a, rcond=None)[0]
    return scipy.optimize.root(conditions, np.append(rough, multipliers), tol=1e-13).x[:size]


@pytest.mark.parametrize("seed", range(20))
def test_weights_are_a_general_optimisers(seed: int) -> None:
    gains, radius = draw_problem(seed)
    np.testing.assert_allclose(solve_kl_ball(gains, radius).numpy(), optimise_generally(gains, radius), atol=1e-6)


def follow_central_path(gains: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Solve problems of one size, [N, C] and [N], at once, by a barrier method (Boyd, Vandenberghe, 2004, ch. 11)."""
    n, size = gains.shape
    gains = gains / abs(gains).max(axis=1, keepdims=True)
    p = np.full((n, size), 1 / size)
    for sharpness in 10.0 ** np.arange(11):  # of the walls around what is allowed
        for _ in range(20):
            slack = (radii + np.log(p * size).mean(axis=1))[:, None]
            slope = 1 / (size * p) / slack
            gradient = -sharpness * gains - slope - 1 / p
            system = np.zeros((n, size + 1, size + 1))  # Newton's, of which the last line keeps the sum at one
            system[:, :size, :size] = slope[:, :, None] * slope[:, None, :]
            system[:, range(size), range(size)] += slope / p + 1 / p**2
            system[:, :size, size] = system[:, size, :size] = 1
            step = np.linalg.solve(system, np.append(-gradient, np.zeros((n, 1)), axis=1)[..., None])[:, :size, 0]
            decrements = -(gradient * step).sum(axis=1, keepdims=True)
            p += step / (1 + np.sqrt(np.maximum(decrements, 0)))  # damped, so that none leaves
    return p


def test_weights_are_those_of_a_barrier_method_on_a_thousand_problems() -> None:
    problems = [draw_problem(seed) for seed in range(1000)]
    for size in range(2, 13):
        gains, radii = zip(*(problem for problem in problems if len(problem[0]) == size), strict=True)
        found = [solve_kl_ball(*problem).numpy() for problem in zip(gains, radii, strict=True)]
        np.testing.assert_allclose(found, follow_central_path(np.stack(gains), np.array(radii)), atol=1e-6)


@few_examples
@given(seeds, radii)
def test_weights_meet_the_conditions_of_optimality(seed: int, radius: float) -> None:
    gains, _ = draw_problem(seed)
    p = solve_kl_ball(gains, radius)
    assert p.sum().item() == pytest.approx(1)
    assert measure_kl(p) == pytest.approx(radius, abs=1e-9)
    # Stationary: gains + multiplier / (size p) is one number for all classes, with a positive multiplier.
    inverse = 1 / (len(p) * p)
    best, worst = int(gains.argmax()), int(gains.argmin())
    multiplier = (gains[best] - gains[worst]) / (inverse[worst] - inverse[best])
    assert multiplier > 0
    level = gains + multiplier * inverse
    torch.testing.assert_close(level, level[:1].expand_as(level), atol=1e-6, rtol=1e-6)


@given(seeds, st.floats(-100, 100), st.floats(0.01, 100))
def test_only_differences_of_gains_and_no_unit_matter(seed: int, shift: float, scale: float) -> None:
    gains, radius = draw_problem(seed)
    torch.testing.assert_close(
        solve_kl_ball(scale * gains + shift, radius), solve_kl_ball(gains, radius), rtol=1e-6, atol=1e-9
    )


def test_two_classes_by_hand() -> None:
    # KL(u || (q, 1 - q)) = r has the root q (1 - q) = exp(-2 r) / 4.
    for radius in (0.01, 0.5, 3.0):
        smaller = (1 - math.sqrt(1 - math.exp(-2 * radius))) / 2
        p = solve_kl_ball(torch.tensor([5.0, -5.0], dtype=torch.float64), radius)
        assert p.tolist() == pytest.approx([1 - smaller, smaller])


@pytest.mark.parametrize("gains", [[0.3, 0.3, 0.3], [1.0, 2.0, 3.0]])
@pytest.mark.parametrize("radius", [0.0, 0.5])
def test_without_radius_or_difference_weights_are_uniform(gains: list[float], radius: float) -> None:
    p = solve_kl_ball(torch.tensor(gains), radius)
    if radius == 0 or len({*gains}) == 1:
        assert p.tolist() == pytest.approx([1 / 3] * 3)
    else:
        assert p.tolist() == sorted(p.tolist())
        assert p[0] < 0.2


@pytest.mark.parametrize("radius", [1e-12, 50.0])
def test_extreme_radii_are_solved(radius: float) -> None:
    p = solve_kl_ball(torch.linspace(-1, 1, 345, dtype=torch.float64), radius)
    assert p.isfinite().all()
    assert p.sum().item() == pytest.approx(1)
    assert measure_kl(p) <= radius * (1 + 1e-6) + 1e-12


def test_margins_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]))
    assert get_margins(logits, torch.tensor([0, 2])).tolist() == pytest.approx([-0.2, 0.3])


# --- samples -----------------------------------------------------------------------------------------------------


def test_classes_that_are_absent_take_no_part() -> None:
    margins, labels = torch.tensor([-0.9, -0.2, -0.5, -0.5]), torch.tensor([7, 2, 7, 4])
    weights = choose_sample_weights(margins, labels, radius=0.5)
    p = solve_kl_ball(torch.tensor([-0.2, -0.5, -0.7]), 0.5)  # of the classes 2, 4 and 7
    assert weights.tolist() == pytest.approx([3 * p[i].item() for i in (2, 0, 2, 1)])


@pytest.mark.parametrize("by", ["mean", "sum"])
def test_without_radius_every_sample_weighs_one(by: str) -> None:
    weights = choose_sample_weights(torch.tensor([0.1, 0.9, 0.3]), torch.tensor([0, 0, 5]), radius=0.0, by=by)
    assert weights.tolist() == [1, 1, 1]


def test_one_class_alone_weighs_one() -> None:
    assert choose_sample_weights(torch.tensor([0.1, 0.9]), torch.tensor([3, 3]), radius=0.5).tolist() == [1, 1]


def test_weights_have_no_gradient() -> None:
    margins = torch.tensor([0.1, -0.4], requires_grad=True)
    assert not choose_sample_weights(margins, torch.tensor([0, 1]), radius=0.5).requires_grad


# --- the authors' numbers ------------------------------------------------------------------------------------------

# TrustAI/FAAL at b20ee9d: `cw` of utils.py, `DAW(10, r_choice=0.5).solve_weight` of FAAL.py, and lines 219 to 253 of
# ft_prn.py (`--loss AT`, `--loss TRADES`), on these logits under attack and clean. All ten classes are present.
LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 3])
ADVERSARIAL = torch.tensor(
    [
        [-2.3, -2.3, -0.5, -0.9, 1.7, 1.4, -0.6, -4.2, 0.6, -2.5],
        [0.7, 0.6, 0.2, 2.5, 2.2, -0.5, -2.7, -3.4, 1.1, 1.6],
        [1.2, -3.1, -0.7, 3.7, 1.5, -1.2, -0.3, 0.4, 2.8, 3.2],
        [1.9, -1.7, -1.2, 0.1, -1.0, 0.5, 0.9, 0.2, 1.3, 0.9],
        [-0.2, 1.6, -0.6, 0.1, 1.0, 4.6, -2.9, -3.2, -1.3, 1.7],
        [2.1, 0.4, -0.5, -0.8, 1.1, -0.8, -0.9, 1.5, 3.0, 6.8],
        [-3.1, -2.5, 3.6, -1.1, -1.1, 1.8, 2.2, 2.6, -3.0, 5.1],
        [-0.9, 0.7, -3.3, -1.1, -1.0, -1.0, -2.1, 2.2, -0.3, 1.6],
        [-0.2, 1.4, -1.7, 0.0, 1.7, -0.8, 2.1, 0.7, -0.5, 4.6],
        [-3.8, -0.1, -2.1, -1.9, 0.1, 1.4, 3.3, -2.7, 0.7, 1.0],
        [-5.2, -3.4, -0.5, 0.6, -1.4, 2.1, -1.2, -2.6, 0.2, -1.3],
        [1.2, -1.5, 2.8, 1.3, 1.0, -2.0, 0.4, 0.2, -1.5, 0.5],
    ]
)
CLEAN = torch.tensor(
    [
        [-1.2, -2.4, 0.2, -2.7, 1.7, 2.8, 2.1, -3.2, 1.0, -1.4],
        [-0.4, 0.6, 2.9, 3.7, 2.7, 0.0, -3.5, -4.8, 2.7, 1.8],
        [-0.4, -3.6, -0.8, 3.4, 2.1, -0.2, 0.2, 0.5, 3.7, 3.2],
        [2.9, -2.5, -1.5, -0.1, 0.9, 1.2, -1.4, -1.0, 1.5, -0.3],
        [-0.1, 2.7, -2.0, 0.6, 0.2, 5.5, -3.1, -4.6, -0.3, 0.2],
        [2.7, 0.6, -0.4, -1.6, 1.7, -2.7, 0.4, 1.3, 3.8, 7.8],
        [-2.7, -4.0, 5.6, -1.0, -1.6, 0.1, 1.7, 2.1, -3.6, 3.6],
        [-1.8, -1.4, -4.4, -1.8, -1.0, -0.7, -2.4, 3.5, -0.3, 0.7],
        [0.2, 1.4, -0.4, -0.3, 1.1, -3.7, 0.6, 1.7, -0.3, 3.9],
        [-2.1, 0.2, -1.1, -0.4, 0.0, 0.8, 2.6, -1.0, -0.3, 0.4],
        [-5.1, -2.8, 0.0, 1.8, -1.4, 1.3, -1.7, -3.0, 0.8, -2.5],
        [1.1, -1.7, 2.7, 2.7, 1.6, -2.5, 0.0, -1.1, 0.2, 2.6],
    ]
)
MARGINS = [
    0.40676555, 0.29661164, 0.43282729, 0.27762792, 0.83801436, 0.95774710,
    0.67389596, -0.22169906, 0.80881184, 0.63740295, 0.64006585, 0.41083726,
]  # fmt: skip
CLASS_WEIGHTS = torch.tensor(
    [
        0.46815577, 0.02613918, 0.03154735, 0.05157235, 0.08203501,
        0.15563799, 0.04977180, 0.01581984, 0.07355145, 0.04576927,
    ]
)  # fmt: skip
LOSSES = {"ce": 7.16149950, "trades": 10.05856705}


def test_margins_are_the_authors() -> None:
    assert get_margins(ADVERSARIAL, LABELS).tolist() == pytest.approx(MARGINS, abs=1e-5)


def test_weights_and_losses_are_the_authors() -> None:
    from torch.nn.functional import cross_entropy

    from daft_domainbed.functional.robust import kl_divergence

    weights = choose_sample_weights(get_margins(ADVERSARIAL, LABELS), LABELS, radius=0.5, by="sum")
    torch.testing.assert_close(weights, 10 * CLASS_WEIGHTS[LABELS], atol=1e-5, rtol=0)
    ce = cross_entropy(ADVERSARIAL, LABELS, reduction="none")
    trades = cross_entropy(CLEAN, LABELS, reduction="none") + 6 * kl_divergence(CLEAN, ADVERSARIAL)
    assert (weights * ce).mean().item() == pytest.approx(LOSSES["ce"], abs=1e-5)
    assert (weights * trades).mean().item() == pytest.approx(LOSSES["trades"], abs=1e-5)
