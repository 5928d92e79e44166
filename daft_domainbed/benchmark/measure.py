"""What a row of the table is: ways of doing a piece of work, in turns, and the medians that are judged by a goal."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

from daft_domainbed.benchmark.workers import Bench

Column = Literal["ours", "host", "bare"]
COLUMNS: tuple[Column, ...] = ("ours", "host", "bare")

Turn = Callable[[], Mapping[str, float]]  # does the work once; values by metric
Round = Mapping[Column, Turn]
Rounds = Generator[Round, None, None]


@dataclass(frozen=True)
class Goal:
    """What is measured, and what is to be reached.

    Attributes:
        metric: The name that turns give their values.
        unit: The values' unit.
        against: The column that "ours" is divided by; None judges "ours" itself, or nothing.
        limit: The limit of the ratio, or of "ours"; None: there is no goal, it is reported.
        at_least: Whether the limit is a lower one.
    """

    metric: str
    unit: str
    against: Column | None = None
    limit: float | None = None
    at_least: bool = False

    def __str__(self) -> str:
        if self.limit is None:
            return "reported"
        sign, value = (
            (">=" if self.at_least else "<="),
            f"{self.limit:,.3g}" if self.limit < 1000 else f"{self.limit:,.0f}",
        )
        return f"{sign} {value} x {self.against}" if self.against else f"{sign} {value} {self.unit}".rstrip()


@dataclass(frozen=True)
class Case:
    """A piece of work that several ways of doing it are compared on.

    Attributes:
        name: The name that `--only` takes.
        about: What is done, in one line.
        bare: What stands in the column of the limit.
        goals: What is to be reached, a row of the table each.
        rounds: Yields what is to be done in turns; whatever it opens is closed when it goes on.
    """

    name: str
    about: str
    bare: str
    goals: tuple[Goal, ...]
    rounds: Callable[[Bench], Rounds]


def take_turns(rounds: Rounds, repeat: int) -> dict[str, dict[Column, list[float]]]:
    """Go through every round so many times, the columns in turns, and return the values by metric and column."""
    values: dict[str, dict[Column, list[float]]] = defaultdict(lambda: defaultdict(list))
    with closing(rounds):
        for one in rounds:
            for i in range(repeat):
                turns = list(one.items())
                for column, do in turns if i % 2 == 0 else reversed(turns):  # nobody always comes second
                    for metric, value in do().items():
                        values[metric][column].append(value)
    return values


def make_row(case: Case, goal: Goal, values: Mapping[Column, list[float]]) -> dict[str, Any]:
    """Return a row of the table: medians, their ratio, and whether the goal was met (None where nothing says)."""
    medians: dict[str, float | None] = {
        column: statistics.median(values[column]) if values.get(column) else None for column in COLUMNS
    }
    ours, other = medians["ours"], medians[goal.against] if goal.against else None
    ratio = ours / other if ours is not None and other else None
    judged = ratio if goal.against else ours
    is_met = None
    if judged is not None and goal.limit is not None:
        is_met = judged >= goal.limit if goal.at_least else judged <= goal.limit
    row: dict[str, Any] = {
        "name": case.name,
        "metric": goal.metric,
        "unit": goal.unit,
        "about": case.about,
        "bare_is": case.bare,
    }
    return (
        row
        | medians
        | {
            "ratio": ratio,
            "against": goal.against,
            "goal": str(goal),
            "met": is_met,
            "n": len(values.get("ours", [])),
            "values": {column: list(values.get(column, [])) for column in COLUMNS},
        }
    )
