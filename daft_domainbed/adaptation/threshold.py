"""Which scores are of images from outside: Otsu's threshold over the last scores of a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from torch import Tensor

_GRID = np.arange(0, 1, 0.01)
QUEUE = 512  # scores; N_m of OWTTT


def find_threshold(scores: Sequence[float]) -> float:
    """Return the threshold that leaves the smallest variance within its two sides (Otsu, 1979; OWTTT's grid).

    Scores at or above it are one side. Of equal ones the lowest is returned, and 0 where none has scores on both sides.

    Example:
        >>> find_threshold([0.1, 0.12, 0.7, 0.72])
        0.13
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    n = len(ordered)
    n_below = np.searchsorted(ordered, _GRID, side="left")
    splits = [k for k in dict.fromkeys(n_below.tolist()) if 0 < k < n]
    if not splits:
        return 0.0
    within = [k / n * ordered[:k].var() + (1 - k / n) * ordered[k:].var() for k in splits]
    best = splits[int(np.argmin(within))]
    return float(_GRID[np.argmax(n_below == best)])


class AdaptiveThreshold:
    """A threshold that follows a stream: that of its last 512 scores."""

    def __init__(self) -> None:
        self.queue: deque[float] = deque(maxlen=QUEUE)

    def update(self, scores: Tensor) -> float:
        """Take note of a batch's scores, [B], and return the threshold over the queue."""
        self.queue.extend(scores.detach().double().tolist())
        return find_threshold(self.queue)
