"""The course of the learning rate over a run."""

from __future__ import annotations

import math


def get_rate_factor(kind: str, step: int, n_steps: int) -> float:
    """Return what the learning rate is multiplied by at a step.

    Args:
        kind: "constant", or "cosine": from the whole rate to nothing over the run (Loshchilov and Hutter, 2017,
            arXiv 1608.03983, equation 5, without restarts).
        step: Counted from 0.
        n_steps: Of the run.

    Example:
        >>> get_rate_factor("cosine", 0, 4), round(get_rate_factor("cosine", 2, 4), 3)
        (1.0, 0.5)
    """
    return 1.0 if kind == "constant" else (1 + math.cos(math.pi * step / n_steps)) / 2
