"""The course of the learning rate, whatever the algorithm and however many optimizers it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

from daft_domainbed.functional.learning_rate import get_rate_factor


class Schedule:
    """Scales the learning rates of an algorithm's optimizers at every step.

    Args:
        kind: As of `get_rate_factor`.
        n_steps: Of the run.
        algorithm: As it was built, before anything is restored.
    """

    def __init__(self, kind: str, n_steps: int, algorithm: Any) -> None:
        self.kind, self.n_steps = kind, n_steps
        self._rates: WeakKeyDictionary[Optimizer, list[float]] = WeakKeyDictionary()
        self._learn_rates(algorithm)

    def apply(self, algorithm: Any, step: int) -> None:
        """Set the rates of a step, counted from 0; an optimizer that was made anew starts from its own."""
        if self.kind == "constant":
            return
        self._learn_rates(algorithm)
        factor = get_rate_factor(self.kind, step, self.n_steps)
        for optimizer in _list_optimizers(algorithm):
            for group, rate in zip(optimizer.param_groups, self._rates[optimizer], strict=True):
                group["lr"] = rate * factor

    def _learn_rates(self, algorithm: Any) -> None:
        for optimizer in _list_optimizers(algorithm):
            if optimizer not in self._rates:
                self._rates[optimizer] = [group["lr"] for group in optimizer.param_groups]


def _list_optimizers(algorithm: Any) -> Iterator[Optimizer]:
    return (value for value in vars(algorithm).values() if isinstance(value, Optimizer))
