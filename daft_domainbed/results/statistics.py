"""Mean and standard error over trials."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return statistics.fmean(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean: sample standard deviation (ddof 1) / sqrt(n); None where n < 2.

    DomainBed prints the deviation with ddof 0, which is smaller by sqrt((n - 1) / n), and 0.0 for a single trial.

    Example:
        >>> round(standard_error([10.0, 20.0, 30.0]), 3)
        5.774
        >>> standard_error([10.0]) is None
        True
    """
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
