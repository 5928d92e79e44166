"""How far an evaluation is, and how long it will take; a line now and then on standard error."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Says what is being asked, and the time left by what the same questions have taken so far.

    Args:
        work: Name and cost of every question that is still to be asked.
    """

    def __init__(self, work: Sequence[tuple[str, float]]) -> None:
        self.left: dict[str, float] = defaultdict(float)
        for name, cost in work:
            self.left[name] += cost
        self.total = sum(self.left.values())
        self.cost: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)
        self.said = time.monotonic()

    def advance(self, name: str, cost: float, seconds: float) -> None:
        """Take note of an answer."""
        self.left[name] -= cost
        self.cost[name] += cost
        self.seconds[name] += seconds

    def estimate(self) -> float | None:
        """Return the seconds that are left; None before there is any answer."""
        done = sum(self.cost.values())
        if not done:
            return None
        rate = sum(self.seconds.values()) / done  # of questions that were not asked yet
        own = {name: self.seconds[name] / cost for name, cost in self.cost.items() if cost}
        return sum(cost * own.get(name, rate) for name, cost in self.left.items())

    def show(self, what: str) -> None:
        """Say what is asked now, unless something was said a moment ago."""
        if time.monotonic() - self.said < SECONDS_BETWEEN_LINES:
            return
        self.said = time.monotonic()
        share = 100 * (1 - sum(self.left.values()) / self.total)
        seconds = self.estimate()
        left = "" if seconds is None else f", about {format_time(seconds)} left"
        print(f"{what} ({share:.0f} % done{left})", file=sys.stderr, flush=True)


def format_time(seconds: float) -> str:
    """Return a time as people say it.

    Example:
        >>> format_time(42), format_time(240), format_time(7200)
        ('42 s', '4 min', '2.0 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
