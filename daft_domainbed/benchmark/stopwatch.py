"""A stopwatch for phases within each other: each second counts for the innermost phase that it was spent in."""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

PHASES = ("imports", "data", "forward", "backward", "optimizer", "evaluation", "resume file", "models", "rest")


class Stopwatch:
    """Adds up the seconds of phases, none twice, on the thread that made it alone.

    Attributes:
        seconds: The seconds of each phase.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0
        self._thread = threading.get_ident()

    def enter(self, phase: str) -> None:
        """Begin a phase; the one that it is part of stands still."""
        self._pass()
        self._open.append(phase)

    def leave(self) -> None:
        """End the phase that began last."""
        self._pass()
        self._open.pop()

    def _pass(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def attribute(self, owner: Any, name: str, phase: str) -> None:
        """Count the time of a function, or of drawing from the iterator that `__iter__` makes, as a phase's."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            self.enter(phase)
            try:
                result = original(*args, **kwargs)
            finally:
                self.leave()
            return self._draw(result, phase) if name == "__iter__" else result

        setattr(owner, name, measured)

    def _draw(self, iterator: Iterator[Any], phase: str) -> Iterator[Any]:
        while True:
            self.enter(phase)
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.leave()
            yield item

    def divide(self, total: float) -> dict[str, float]:
        """Return each phase's share of a total, in percent; what was in none is the rest."""
        shares = {phase: 100 * self.seconds[phase] / total for phase in PHASES[:-1]}
        return {"seconds": total, **shares, "rest": 100 - sum(shares.values())}
