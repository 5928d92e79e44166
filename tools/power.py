"""What so many paired trials can show, by the normal approximation."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist


def find_smallest_effect(deviation: float, n_trials: int, level: float = 0.05, power: float = 0.8) -> float:
    """Return the mean difference that a two-sided test of so many trials finds with a given power.

    Args:
        deviation: Standard deviation of a trial's paired difference, in points.
        n_trials: Paired trials.
        level: Of the test.
        power: Probability of finding it.

    Example:
        >>> round(find_smallest_effect(2.0, 16), 2)
        1.4
    """
    normal = NormalDist()
    return (normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)) * deviation / sqrt(n_trials)


def find_smallest_margin(deviation: float, n_trials: int, level: float = 0.05, power: float = 0.8) -> float:
    """Return the margin within which two methods that do not differ are shown to be equivalent with a given power.

    By two one-sided tests (Schuirmann, 1987), both of which have to succeed.

    Example:
        >>> round(find_smallest_margin(2.0, 16), 2)
        1.46
    """
    normal = NormalDist()
    return (normal.inv_cdf(1 - level) + normal.inv_cdf((1 + power) / 2)) * deviation / sqrt(n_trials)
