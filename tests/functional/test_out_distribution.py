from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from daft_domainbed.functional.attacks import get_norms, run_pgd
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.functional.out_distribution import (
    measure_log_confidence,
    measure_uniform_divergence,
    raise_confidence,
)

seeds = st.integers(0, 2**32 - 1)
UNIT = INPUT_SPECS["unit"]


def draw_logits(seed: int) -> Tensor:
    return 3 * torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(seeds)
def test_uniform_divergence_is_the_sum_of_its_definition(seed: int) -> None:
    logits = draw_logits(seed)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(measure_uniform_divergence(logits), (np.log(0.25 / p) / 4).sum(axis=1))
    uniform = torch.full_like(logits, 0.25)
    cross_entropy = F.cross_entropy(logits, uniform, reduction="none")
    torch.testing.assert_close(measure_uniform_divergence(logits), cross_entropy - math.log(4))


@given(seeds)
def test_uniform_divergence_falls_as_logits_shrink_and_ends_at_zero(seed: int) -> None:
    logits = draw_logits(seed)
    values = torch.stack([measure_uniform_divergence(scale * logits) for scale in (1.0, 0.5, 0.1, 0.0)])
    assert (values.diff(dim=0) <= 0).all()
    assert (values[-1] == 0).all()


def test_log_confidence_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    assert measure_log_confidence(logits).exp().tolist() == pytest.approx([0.5, 0.8])


# --- the authors' numbers --------------------------------------------------------------------------------------------

# M4xim4l/InNOutRobustness at d81d1d2: `ACETObjective(model, 0, config, "KL", "KL", 4)` and `AdversarialLoss(model, 0,
# config, 4, "crossentropy")` with `create_attack_config(0.5, 5, 0.1, "l2", momentum=0.0, pgd="pgd",
# normalize_gradient=True)` on a linear model of two images of 3 x 2 x 2 pixels.
WEIGHT = torch.tensor(
    [
        [0.5, -0.2, 0.8, 0.1, -0.6, 0.3, 0.9, -0.4, 0.2, 0.7, -0.1, 0.0],
        [-0.3, 0.6, 0.1, -0.9, 0.4, 0.2, -0.5, 0.8, 0.0, -0.7, 0.3, 0.1],
        [0.2, 0.1, -0.4, 0.6, 0.5, -0.8, 0.3, -0.2, 0.7, 0.0, -0.6, 0.4],
        [0.0, -0.5, 0.3, 0.2, -0.1, 0.6, -0.7, 0.4, -0.3, 0.9, 0.8, -0.2],
    ]
)
BIAS = torch.tensor([0.1, -0.2, 0.0, 0.3])
PIXELS = torch.tensor(
    [
        [0.1, 0.9, 0.5, 0.3, 0.0, 1.0, 0.7, 0.2, 0.6, 0.4, 0.8, 0.5],
        [0.6, 0.2, 0.9, 0.1, 0.5, 0.5, 0.3, 1.0, 0.0, 0.7, 0.4, 0.8],
    ]
).view(2, 3, 2, 2)
LABELS = torch.tensor([2, 1])
OUTSIDE = [
    [
        0.20792168, 0.78062308, 0.70417386, 0.34202185, 0.00000000, 1.00000000,
        0.88733268, 0.06833671, 0.55375320, 0.62490821, 0.83205515, 0.43997127,
    ],
    [
        0.61834395, 0.03199719, 1.00000000, 0.14645906, 0.36080375, 0.70622760,
        0.20608190, 1.00000000, 0.00000000, 0.95562577, 0.59569967, 0.70215911,
    ],
]  # fmt: skip
INSIDE = [
    [
        0.10787480, 0.83408332, 0.70757920, 0.17090222, 0.00000000, 1.00000000,
        0.67759830, 0.24654159, 0.44889137, 0.53008294, 0.98550963, 0.40061769,
    ],
    [
        0.70400625, 0.00512829, 0.97189087, 0.32356927, 0.36508662, 0.54055649,
        0.39870280, 0.84646559, 0.00000000, 1.00000000, 0.41349423, 0.76183009,
    ],
]  # fmt: skip
CLEAN_LOSSES, ADVERSARIAL_LOSSES, LOSS = (2.32429409, 0.27674994), (3.20991611, 0.61567831), 1.91279721


def model(x: Tensor) -> Tensor:
    return F.linear(x.flatten(1), WEIGHT, BIAS)


def measure_error(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, LABELS, reduction="none")


def test_uniform_divergence_is_the_authors() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.3, 0.3, -2.0, 1.7], [0.0, 0.0, 0.0, 0.0]])
    assert measure_uniform_divergence(logits).tolist() == pytest.approx([0.58105522, 0.65604496, 0.0], abs=1e-5)


def test_attacks_and_losses_are_the_authors() -> None:
    attack = {"eps": 0.5, "norm": "l2", "steps": 5, "step_size": 0.1, "spec": UNIT}
    inside = run_pgd(lambda x: measure_error(model(x)).sum(), PIXELS, **attack)
    outside = run_pgd(lambda x: measure_uniform_divergence(model(x)).sum(), PIXELS, **attack)
    torch.testing.assert_close(inside.flatten(1), torch.tensor(INSIDE), atol=1e-5, rtol=0)
    torch.testing.assert_close(outside.flatten(1), torch.tensor(OUTSIDE), atol=1e-5, rtol=0)
    clean = measure_error(model(PIXELS)).mean().item(), measure_uniform_divergence(model(PIXELS)).mean().item()
    found = measure_error(model(inside)).mean().item(), measure_uniform_divergence(model(outside)).mean().item()
    assert clean == pytest.approx(CLEAN_LOSSES, abs=1e-5)
    assert found == pytest.approx(ADVERSARIAL_LOSSES, abs=1e-5)
    assert sum(found) / 2 == pytest.approx(LOSS, abs=1e-5)


# --- attacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # of SciPy, by foolbox
@pytest.mark.parametrize("measure", [measure_uniform_divergence, measure_log_confidence])
def test_points_are_foolboxs(measure: object) -> None:
    import foolbox

    class Attack(foolbox.attacks.L2ProjectedGradientDescentAttack):
        def get_loss_fn(self, fmodel: object, labels: object) -> object:
            from eagerpy import astensor

            return lambda x: astensor(measure(fmodel(x).raw).sum())

    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    network[1].load_state_dict({"weight": WEIGHT, "bias": BIAS})
    ours = run_pgd(lambda x: measure(network(x)).sum(), PIXELS, eps=0.4, norm="l2", steps=5, step_size=0.15, spec=UNIT)
    theirs, _, _ = Attack(abs_stepsize=0.15, steps=5, random_start=False)(
        foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu"), PIXELS, LABELS, epsilons=0.4
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert get_norms(theirs - PIXELS, "l2").max() > 0.3


@given(seeds)
def test_confidence_is_raised_inside_the_ball_and_never_lowered(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(6, 3, 2, 2, generator=generator)
    weight = 5 * torch.randn(4, 12, generator=generator)

    def rough(x: Tensor) -> Tensor:
        return torch.sin(3 * F.linear(x.flatten(1), weight))

    found = raise_confidence(rough, pixels, eps=0.7, norm="l2", steps=2, spec=UNIT)
    before, after = measure_log_confidence(rough(pixels)), measure_log_confidence(rough(found))
    assert (after >= before).all()
    assert (get_norms(found - pixels, "l2") <= 0.7 + 1e-5).all()
    assert found.min() >= 0
    assert found.max() <= 1
