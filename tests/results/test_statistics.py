from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daft_domainbed.results.statistics import adjust_holm, bootstrap_mean, flip_signs, mean, standard_error


def test_by_hand():
    # deviations -2, 0, 2: variance 8 / 2 = 4, deviation 2, error 2 / sqrt(3)
    assert mean([1.0, 3.0, 5.0]) == 3.0
    assert standard_error([1.0, 3.0, 5.0]) == pytest.approx(2 / math.sqrt(3))


def test_of_nothing_and_of_one():
    assert mean([]) is None
    assert standard_error([]) is None
    assert standard_error([3.0]) is None


@given(st.lists(st.floats(0, 100), min_size=2, max_size=20))
def test_against_numpy(values):
    assert mean(values) == pytest.approx(np.mean(values))
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-9)


def test_sign_flips_by_hand():
    # of the 16 patterns of (1, 1, 1, -1), |sum| >= 2 has all but those that sum to 0: 16 - 6
    assert flip_signs([1.0, 1.0, 1.0, -1.0]) == 10 / 16
    assert flip_signs([0.0, 0.0]) == 1.0


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8))
def test_sign_flips_against_scipy(values):
    scipy_stats = pytest.importorskip("scipy.stats")
    values = [round(value, 3) for value in values]

    def total(x, axis):
        return np.abs(np.sum(x, axis=axis))

    expected = scipy_stats.permutation_test(
        (np.array(values),),
        total,
        permutation_type="samples",
        n_resamples=np.inf,
        alternative="greater",
        vectorized=True,
    )
    assert flip_signs(values) == pytest.approx(expected.pvalue)


def test_sign_flips_of_many_trials_are_sampled():
    rng = np.random.default_rng(1)
    differences = rng.normal(0.3, 1.0, 40)
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(40))
    # the normal approximation of the same test
    assert flip_signs(differences) == pytest.approx(math.erfc(abs(t) / math.sqrt(2)), abs=0.02)


def test_bootstrap_against_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(2).normal(1.0, 2.0, 16)
    expected = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert bootstrap_mean(values) == pytest.approx((expected.low, expected.high), abs=0.05)
    assert bootstrap_mean(values) == bootstrap_mean(values)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_monotone_and_between_none_and_bonferroni(p_values):
    adjusted = adjust_holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(p_values) * p) or q == max(adjusted[i] for i, r in enumerate(p_values) if r <= p)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)
