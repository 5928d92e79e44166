from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from daft_domainbed.adaptation.threshold import AdaptiveThreshold, find_threshold


def find_by_force(scores: list[float]) -> tuple[float, list[float]]:
    """Otsu's threshold by its definition, and the criterion at every one of the hundred."""
    criteria = []
    for k in range(100):
        sides = [[s for s in scores if s < 0.01 * k], [s for s in scores if s >= 0.01 * k]]
        if not all(sides):
            criteria.append(float("inf"))
            continue
        total = 0.0
        for side in sides:
            centre = sum(side) / len(side)
            total += sum((s - centre) ** 2 for s in side) / len(scores)
        criteria.append(total)
    return 0.01 * criteria.index(min(criteria)), criteria


@given(st.lists(st.floats(0, 1.5, width=32), min_size=1, max_size=40))
def test_it_is_otsus_by_brute_force(scores: list[float]) -> None:
    found, (wanted, criteria) = find_threshold(scores), find_by_force(scores)
    if found != pytest.approx(wanted):  # of two splits that are equally good
        assert criteria[round(100 * found)] == pytest.approx(min(criteria), abs=1e-12)


def test_two_kinds_are_told_apart() -> None:
    draw = np.random.default_rng(0)
    scores = [*draw.normal(0.2, 0.03, 300), *draw.normal(0.7, 0.05, 100)]
    assert max(scores[:300]) < find_threshold(scores) < min(scores[300:])


@pytest.mark.parametrize("scores", [[0.3], [0.3, 0.3], [1.2, 1.4]])
def test_where_nothing_separates_it_is_zero(scores: list[float]) -> None:
    assert find_threshold(scores) == 0


def test_the_queue_forgets() -> None:
    threshold = AdaptiveThreshold()
    threshold.update(torch.full((512,), 0.9))
    assert threshold.update(torch.cat([torch.full((256,), 0.1), torch.full((256,), 0.4)])) == pytest.approx(0.11)
