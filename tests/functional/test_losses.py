from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daft_domainbed.functional.attacks import run_pgd
from daft_domainbed.functional.losses import kd_loss, mix_targets, soft_cross_entropy, worst_case_linear_loss

few_examples = settings(max_examples=40)

seeds = st.integers(0, 2**32 - 1)
temperatures = st.floats(0.25, 20)


def draw(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(logits: Tensor, temperature: float) -> np.ndarray:
    """Independent of torch, and not in log space."""
    exponentials = np.exp(logits.numpy() / temperature)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


# --- kd_loss -----------------------------------------------------------------------------------------------------


@few_examples
@given(seeds, temperatures, st.integers(1, 5), st.integers(2, 6))
def test_kd_loss_is_the_scaled_divergence_of_probabilities(seed: int, temperature: float, n: int, k: int) -> None:
    student, teacher = draw(seed, n, k), draw(seed + 1, n, k)
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum() / n
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert kd_loss(student, teacher, temperature) > -1e-12


@few_examples
@given(seeds, temperatures)
def test_kd_loss_of_equal_distributions_is_zero_with_zero_gradient(seed: int, temperature: float) -> None:
    teacher = draw(seed, 3, 4)
    student = (teacher + 5).requires_grad_()  # another constant, the same distribution
    loss = kd_loss(student, teacher, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-12


def test_kd_loss_is_a_batch_mean_not_an_element_mean() -> None:
    # Teacher (3/4, 1/4), student (1/4, 3/4): the divergence is 1/2 log 3 a row.
    row = torch.tensor([[math.log(3.0), 0.0]])
    for copies in (1, 7):
        teacher = row.repeat(copies, 1)
        assert kd_loss(-teacher, teacher, 1.0).item() == pytest.approx(math.log(3) / 2)


def test_kd_loss_scales_by_the_squared_temperature() -> None:
    row = 4 * torch.tensor([[math.log(3.0), 0.0]])  # at temperature 4, the distributions of the test above
    assert kd_loss(-row, row, 4.0).item() == pytest.approx(16 * math.log(3) / 2, rel=1e-5)


def test_kd_gradient_tends_to_logit_matching() -> None:
    student, teacher = draw(0, 3, 5).requires_grad_(), draw(1, 3, 5)
    gap = student.detach() - teacher
    limit = (gap - gap.mean(dim=1, keepdim=True)) / (3 * 5)  # Hinton et al. (2015), eq. 4, for the batch mean
    errors = []
    for temperature in (10.0, 100.0, 1000.0):
        (gradient,) = torch.autograd.grad(kd_loss(student, teacher, temperature), student)
        errors.append((gradient - limit).abs().max().item())
    # First order in 1 / temperature.
    assert errors[1] < errors[0] / 8
    assert errors[2] < errors[1] / 8
    assert errors[2] < 1e-2 * limit.abs().max()


def test_kd_loss_gives_the_teacher_no_gradient() -> None:
    student, teacher = draw(0, 2, 3).requires_grad_(), draw(1, 2, 3).requires_grad_()
    kd_loss(student, teacher, 2.0).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_kd_loss_survives_certainty() -> None:
    certain = torch.tensor([[1e4, 0.0, -1e4]])
    loss = kd_loss(certain.flip(1).requires_grad_(), certain, 1.0)
    assert loss.item() == pytest.approx(2e4)


# --- targets -----------------------------------------------------------------------------------------------------


@few_examples
@given(seeds, st.floats(0, 1), temperatures)
def test_mixed_targets_are_the_blend(seed: int, mix: float, temperature: float) -> None:
    logits, labels = draw(seed, 4, 3), torch.tensor([0, 2, 1, 1])
    expected = (1 - mix) * np.eye(3)[labels.numpy()] + mix * softmax(logits, temperature)
    targets = mix_targets(labels, logits.requires_grad_(), mix, temperature)
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(targets.sum(dim=1).numpy(), 1)
    assert not targets.requires_grad


def test_no_mix_is_exactly_one_hot() -> None:
    targets = mix_targets(torch.tensor([1, 0]), torch.tensor([[9.0, -3.0], [0.1, 0.2]]), 0.0, 1.0)
    assert targets.tolist() == [[0, 1], [1, 0]]


@few_examples
@given(seeds)
def test_soft_cross_entropy_is_torchs_with_class_probabilities(seed: int) -> None:
    logits, targets = draw(seed, 4, 5), draw(seed + 1, 4, 5).softmax(dim=1)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), F.cross_entropy(logits, targets))


def test_soft_cross_entropy_of_one_hot_targets_is_that_of_labels() -> None:
    logits, labels = draw(0, 6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(soft_cross_entropy(logits, F.one_hot(labels, 3).double()), expected)


# --- the bound of a linear head ----------------------------------------------------------------------------------


def perturb_head(seed: int, k: int, eps: float, steps: int, **pgd: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return a linear head's loss at PGD's points, the bound, and the plain loss; for labels."""
    features, weight, bias = draw(seed, 4, 6), draw(seed + 1, k, 6, scale=1.0), draw(seed + 2, k)
    labels = torch.arange(4) % k

    def summed(z: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(z, weight, bias), labels, reduction="sum")

    found = run_pgd(summed, features, eps=eps, norm="l2", steps=steps, **pgd)  # type: ignore[arg-type]
    targets = F.one_hot(labels, k).double()
    bound = worst_case_linear_loss(F.linear(features, weight, bias), weight, targets, eps)
    return summed(found) / 4, bound, summed(features) / 4


@few_examples
@given(seeds, st.floats(0.01, 2))
def test_bound_is_what_pgd_converges_to_for_two_classes(seed: int, eps: float) -> None:
    found, bound, plain = perturb_head(seed, 2, eps, steps=5)
    torch.testing.assert_close(found, bound)
    assert bound > plain


def test_bound_is_attained_at_the_difference_of_the_rows_for_two_classes() -> None:
    features, weight, eps = draw(0, 1, 6), draw(1, 2, 6), 0.7
    for label in (0, 1):
        away = weight[1 - label] - weight[label]
        worst = features + eps * away / away.norm()
        expected = F.cross_entropy(worst @ weight.T, torch.tensor([label]))
        targets = F.one_hot(torch.tensor([label]), 2).double()
        torch.testing.assert_close(worst_case_linear_loss(features @ weight.T, weight, targets, eps), expected)


@few_examples
@given(seeds, st.integers(3, 6), st.floats(0.01, 2), seeds)
def test_bound_is_above_every_perturbation_for_more_classes(seed: int, k: int, eps: float, start: int) -> None:
    generator = torch.Generator().manual_seed(start)
    found, bound, plain = perturb_head(seed, k, eps, steps=15, generator=generator)
    assert found <= bound + 1e-12
    assert plain < bound


def test_bound_of_a_soft_target_averages_the_bounds_of_its_classes() -> None:
    logits, weight = draw(0, 1, 4), draw(1, 4, 6)
    targets = torch.tensor([[0.5, 0.2, 0.3, 0.0]], dtype=torch.float64)
    one_class = [worst_case_linear_loss(logits, weight, torch.eye(4).double()[k : k + 1], 0.4) for k in range(4)]
    expected = 0.5 * one_class[0] + 0.2 * one_class[1] + 0.3 * one_class[2]
    torch.testing.assert_close(worst_case_linear_loss(logits, weight, targets, 0.4), expected)


def test_bound_by_hand_for_three_classes() -> None:
    # |w_0 - w_1| = 5, |w_0 - w_2| = 1: rivals of class 0 are raised by 1 and 0.2.
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, -1.0]], dtype=torch.float64)
    logits = torch.tensor([[1.0, 0.5, -0.5]], dtype=torch.float64)
    loss = worst_case_linear_loss(logits, weight, torch.eye(3).double()[:1], 0.2)
    assert loss.item() == pytest.approx(math.log(math.exp(1.0) + math.exp(0.5 + 1.0) + math.exp(-0.5 + 0.2)) - 1.0)


@few_examples
@given(seeds, st.integers(2, 5))
def test_bound_without_radius_is_the_plain_loss(seed: int, k: int) -> None:
    logits, targets = draw(seed, 3, k), draw(seed + 1, 3, k).softmax(dim=1)
    bound = worst_case_linear_loss(logits, draw(seed + 2, k, 4), targets, 0.0)
    torch.testing.assert_close(bound, soft_cross_entropy(logits, targets))


def test_bound_takes_the_radius_as_a_tensor() -> None:
    logits, weight, targets = draw(0, 3, 4), draw(1, 4, 6), draw(2, 3, 4).softmax(dim=1)
    as_tensor = worst_case_linear_loss(logits, weight, targets, torch.tensor(0.3, dtype=torch.float64))
    assert as_tensor == worst_case_linear_loss(logits, weight, targets, 0.3)


def test_bound_has_the_gradient_that_finite_differences_give() -> None:
    features, targets = draw(0, 3, 5), draw(1, 3, 4).softmax(dim=1)
    weight = draw(2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: worst_case_linear_loss(features @ w.T, w, targets, 0.3), weight)


def test_bound_has_a_finite_gradient_where_rows_coincide() -> None:
    features, targets = draw(0, 3, 5), torch.eye(3).double()
    start = draw(1, 1, 5).repeat(3, 1)

    def get_gradient(loss: Tensor, weight: Tensor) -> Tensor:
        return torch.autograd.grad(loss, weight)[0]

    weight = start.clone().requires_grad_()
    gradient = get_gradient(worst_case_linear_loss(features @ weight.T, weight, targets, 0.5), weight)
    # Equal rows leave the adversary nothing to gain.
    torch.testing.assert_close(gradient, get_gradient(soft_cross_entropy(features @ weight.T, targets), weight))
