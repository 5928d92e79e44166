"""Is one algorithm better than another? Paired by trial, with intervals and p-values that a reviewer accepts.

The unit is the trial: the held-out domains of one trial share their source images, so they are no independent samples.
A trial's number is the mean, over held-out domains, of the accuracy that a selection chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.results.cells import Table
from daft_domainbed.results.statistics import adjust_holm, bootstrap_mean, flip_signs, mean
from daft_domainbed.results.tables import Results

# Of three normal samples the percentile bootstrap's 95 % interval covers the mean in 76 % of cases, of ten in 90 %; and
# with five no sign-flip test comes below 0.05.
FEWEST_TRIALS = 6


@dataclass(frozen=True)
class Comparison:
    """How one algorithm does against another on a data set.

    Attributes:
        dataset: Its name.
        selection: The rule that chose the checkpoints.
        first: The algorithm whose gain it is.
        second: The algorithm that it is compared with.
        n: Trials in which both have a number for every held-out domain.
        gain: Mean of first minus second, in points of accuracy.
        interval: 95 % interval of the gain; None for fewer than six trials, of which a bootstrap covers much less.
        p: Two-sided, by exact sign flips; None for fewer than two trials.
        p_adjusted: The same after Holm's correction for the comparisons of this data set.
        gains: Mean gain on each held-out domain.
        origins: What the networks of both start from, where they do not start from nothing.
    """

    dataset: str
    selection: str
    first: str
    second: str
    n: int
    gain: float | None
    interval: tuple[float, float] | None
    p: float | None
    p_adjusted: float | None
    gains: dict[str, float | None]
    origins: list[str] = field(default_factory=list)


def compare(
    results: Results, first: str, others: Sequence[str], selection: str = "training-domain"
) -> list[Comparison]:
    """Compare an algorithm's students with others' on every data set; Holm's correction is over a data set's family.

    Raises:
        UsageError: An algorithm has no students in any table.
    """
    tables = [table for table in results.tables if table.selection == selection]
    known = {row.name for table in tables for row in table.rows if row.role == "student"}
    for name in (first, *others):
        if name not in known:
            raise UsageError(
                f"--compare {name}: no students of it here.{suggest(name, known)} There are {', '.join(sorted(known))}"
            )
    if len({first, *others}) < 1 + len(others):
        raise UsageError(f"--compare {' '.join((first, *others))}: an algorithm is named twice")
    return [entry for table in tables for entry in correct_family([_compare(table, first, other) for other in others])]


def correct_family(family: Sequence[Comparison]) -> list[Comparison]:
    """Fill in the p-values corrected for a family of comparisons, those that could not be tested left out."""
    adjusted = iter(adjust_holm([entry.p for entry in family if entry.p is not None]))
    return [entry if entry.p is None else replace(entry, p_adjusted=next(adjusted)) for entry in family]


def _compare(table: Table, first: str, second: str) -> Comparison:
    entry = compare_trials(table, first, second, collect_trials(table, first), collect_trials(table, second))
    rows = [row for row in table.rows if row.role == "student" and row.name in (first, second)]
    return replace(entry, origins=list(dict.fromkeys(f"{row.name} rests on {o}" for row in rows for o in row.origins)))


def compare_trials(
    table: Table, first: str, second: str, of_first: Mapping[int, list[float]], of_second: Mapping[int, list[float]]
) -> Comparison:
    """Compare two lots of trials, which may be of two sweeps of the same data set.

    Args:
        table: Names data set, selection and held-out domains.
        first: What those are called whose gain it is.
        second: What they are compared with.
        of_first: Accuracy of the first in percent on each held-out domain, by trial.
        of_second: The same of the second; only trials that both have count.
    """
    trials = sorted(of_first.keys() & of_second.keys())
    pairs = np.array([np.subtract(of_first[trial], of_second[trial]) for trial in trials])
    gains = pairs.mean(axis=1).tolist() if trials else []
    is_tested = len(gains) > 1
    places = list_places(table, len(pairs[0]) if trials else None)
    by_place = pairs.mean(axis=0) if trials else np.zeros(0)
    by_env = {
        env: float(np.mean([gain for gain, place in zip(by_place, places, strict=True) if place == env]))
        if trials
        else None
        for env in dict.fromkeys(places)
    }
    return Comparison(
        dataset=table.name,
        selection=table.selection,
        first=first,
        second=second,
        n=len(gains),
        gain=mean(gains),
        interval=bootstrap_mean(gains) if len(gains) >= FEWEST_TRIALS else None,
        p=flip_signs(gains) if is_tested else None,
        p_adjusted=None,
        gains=by_env,
    )


def collect_trials(table: Table, algorithm: str) -> dict[int, list[float]]:
    """Return a student's accuracies, in percent, of each trial that has one for every held-out domain asked for.

    Args:
        table: Of a selection.
        algorithm: The student's, with what tells its rows apart where it has several.
    """
    by_row = [row.list_trials() for row in table.rows if (row.role, row.name) == ("student", algorithm)]
    trials = sorted(set.intersection(*map(set, by_row))) if by_row else []
    return {trial: [acc for trials_of in by_row for acc in trials_of[trial]] for trial in trials}


def list_places(table: Table, count: int | None) -> list[str]:
    """Return the held-out domain of each accuracy of a trial, as `collect_trials` has them.

    Args:
        table: Whose first student's rows are looked at.
        count: How many accuracies there are; None where nobody knows.
    """
    students = [row for row in table.rows if row.role == "student"]
    places = [cell.env for row in students if row.name == students[0].name for cell in row.asked]
    return places if count in (None, len(places)) else table.environments
