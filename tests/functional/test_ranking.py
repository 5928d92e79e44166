"""Divergences of lists against hand-worked numbers and independent code; measures against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from daft_domainbed.functional.ranking import (
    DIVERGENCES,
    gains,
    listmle_divergence,
    listmle_loss,
    pairwise_divergence,
    rank_right,
    reciprocal_ranks,
)

LISTS = st.lists(st.floats(-5, 5), min_size=2, max_size=6)


def make_pair(seed: int, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, other = torch.randn(2, 3, size, generator=generator, dtype=torch.float64)
    return s, other


@pytest.mark.parametrize("form", DIVERGENCES)
@given(values=LISTS)
def test_equal_lists_are_not_apart(form: str, values: list[float]) -> None:
    s = torch.tensor([values], dtype=torch.float64)
    assert DIVERGENCES[form](s, s.clone()).abs().max() < 1e-9


@pytest.mark.parametrize("form", DIVERGENCES)
def test_only_differences_count_and_not_the_order_of_candidates(form: str) -> None:
    s, other = make_pair(0)
    wanted = DIVERGENCES[form](s, other)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(DIVERGENCES[form](s + 2, other - 7), wanted)
    torch.testing.assert_close(DIVERGENCES[form](s[:, order], other[:, order]), wanted)


def test_numbers_worked_by_hand() -> None:
    s = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    other = torch.zeros(1, 2, dtype=torch.float64)
    # P(s) = (3/4, 1/4), P(s') = (1/2, 1/2); with two candidates the one pair is the list.
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert DIVERGENCES["kl"](s, other).item() == pytest.approx(kl)
    assert DIVERGENCES["pairwise"](s, other).item() == pytest.approx(kl)
    # The order of s is (0, 1): -log(1/2) under s', -log(3/4) under s itself.
    assert DIVERGENCES["listmle"](s, other).item() == pytest.approx(math.log(2) + math.log(0.75))


def test_three_candidates_worked_by_hand() -> None:
    s = torch.tensor([[0.0, math.log(2.0), 0.0]], dtype=torch.float64)
    other = torch.zeros(1, 3, dtype=torch.float64)
    pair = (2 / 3) * math.log(4 / 3) + (1 / 3) * math.log(2 / 3)  # (0, 1) and (1, 2); (0, 2) are equal in both
    assert pairwise_divergence(s, other).item() == pytest.approx(2 * pair)
    own = -math.log(2 / 4) - math.log(1 / 2)
    assert listmle_divergence(s, other).item() == pytest.approx(math.log(6) - own)


def test_pairwise_against_a_loop() -> None:
    s, other = make_pair(1)
    for row, others, value in zip(s, other, pairwise_divergence(s, other), strict=True):
        total = 0.0
        for i, j in itertools.combinations(range(5), 2):
            p, q = torch.sigmoid(row[i] - row[j]), torch.sigmoid(others[i] - others[j])
            mine, theirs = (torch.distributions.Bernoulli(probs=probability) for probability in (p, q))
            total += torch.distributions.kl_divergence(mine, theirs).item()
        assert value.item() == pytest.approx(total)


def test_listmle_against_drawing_without_replacement() -> None:
    s, _ = make_pair(2, size=4)
    total = 0.0
    for order in itertools.permutations(range(4)):
        left, probability = list(range(4)), 1.0
        for first in order:
            weights = [math.exp(s[0, i].item()) for i in left]
            probability *= weights[left.index(first)] / sum(weights)
            left.remove(first)
        assert listmle_loss(s[:1], torch.tensor([order])).item() == pytest.approx(-math.log(probability))
        total += probability
    assert total == pytest.approx(1)


def test_gradients_reach_what_they_should() -> None:
    for form in DIVERGENCES:
        s, other = (scores.clone().requires_grad_() for scores in make_pair(3))
        DIVERGENCES[form](s, other).sum().backward()
        assert other.grad is not None and other.grad.abs().max() > 0
        assert (s.grad is None) == (form == "listmle")  # which takes the order as it is


def test_divergences_stay_finite() -> None:
    s, other = torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([[-200.0, 0.0, 200.0]])
    for divergence in DIVERGENCES.values():
        assert divergence(s, other).isfinite().all()


def test_ranks_and_their_measures() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.5, 0.5, 0.1]])
    ranks = rank_right(scores, torch.tensor([1, 1, 0]))
    assert ranks.tolist() == [1, 3, 2]  # of equal scores the right one comes last
    assert reciprocal_ranks(ranks).tolist() == pytest.approx([1, 1 / 3, 1 / 2])
    assert gains(ranks).tolist() == pytest.approx([1, 1 / 2, 1 / math.log2(3)])
    far = torch.arange(20.0, 0, -1).unsqueeze(0)
    assert reciprocal_ranks(rank_right(far, torch.tensor([10]))).item() == 0
    assert reciprocal_ranks(rank_right(far, torch.tensor([9]))).item() == pytest.approx(0.1)


def test_measures_against_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    right = torch.arange(6)
    truth = torch.nn.functional.one_hot(right, 20)
    theirs = [metrics.ndcg_score(t[None].numpy(), s[None].numpy(), k=10) for t, s in zip(truth, scores, strict=True)]
    assert gains(rank_right(scores, right)).tolist() == pytest.approx(theirs)
    reciprocal = metrics.label_ranking_average_precision_score(truth.numpy(), scores.numpy())
    assert reciprocal_ranks(rank_right(scores, right), cut=20).mean().item() == pytest.approx(reciprocal)
