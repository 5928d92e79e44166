"""Means over trials, their errors and intervals, and tests of paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

_DRAWS = 10_000
N_FLIPS = 100_000  # of the signs of more trials than can be enumerated
_SEED = 0  # fixed, so that an interval is a function of the records
MOST_EXACT = 20  # trials; 2**20 sign patterns are still enumerated in a second
_AT_ONCE = 2**16


def mean(values: Sequence[float]) -> float | None:
    """Return the arithmetic mean; None without values."""
    return statistics.fmean(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean: sample standard deviation (ddof 1) / sqrt(n); None where n < 2.

    DomainBed prints the deviation with ddof 0, which is smaller by sqrt((n - 1) / n), and 0.0 for a single trial.

    Example:
        >>> round(standard_error([10.0, 20.0, 30.0]), 3)
        5.774
        >>> standard_error([10.0]) is None
        True
    """
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def bootstrap_mean(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean (Efron & Tibshirani, 1993); 10,000 resamples, fixed seed.

    Args:
        values: A number of each trial, the unit that is resampled.
        level: The level of confidence.

    Example:
        >>> bootstrap_mean([2.0, 2.0, 2.0])
        (2.0, 2.0)
    """
    data = np.asarray(values, float)
    drawn = np.random.default_rng(_SEED).integers(len(data), size=(_DRAWS, len(data)))
    low, high = np.quantile(data[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def flip_signs(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of a mean difference of 0, by random flips of each sign (Fisher, 1935).

    All 2**n sign patterns are enumerated for up to 20 differences; beyond, 100,000 are drawn with a fixed seed, and the
    observed one is counted among them.

    Example:
        Of the 8 patterns of three positive differences, the observed one and its mirror are as extreme.

        >>> flip_signs([1.0, 2.0, 3.0])
        0.25
    """
    data = np.asarray(differences, float)
    observed = abs(data.sum())
    tolerance = 1e-9 * np.abs(data).sum()  # sums of the same numbers in other orders are the same sum

    def count(signs: np.ndarray) -> int:
        return int((np.abs(signs @ data) >= observed - tolerance).sum())

    if len(data) > MOST_EXACT:
        signs = np.random.default_rng(_SEED).choice([-1.0, 1.0], size=(N_FLIPS, len(data)))
        return (1 + count(signs)) / (1 + len(signs))
    total, places = 2 ** len(data), np.arange(len(data))
    extreme = 0
    for start in range(0, total, _AT_ONCE):
        patterns = np.arange(start, min(start + _AT_ONCE, total))
        extreme += count(1.0 - 2.0 * (patterns[:, None] >> places & 1))
    return extreme / total


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that hold for a whole family of tests, by Holm's step-down correction (Holm, 1979).

    Example:
        >>> adjust_holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
