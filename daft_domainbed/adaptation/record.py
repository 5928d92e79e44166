"""From the counts of streams to the rows of the json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from daft_domainbed.results.statistics import mean, standard_error

KINDS = ("acc_s", "acc_n", "acc_h")


def name_stream(method: str, trial: int) -> str:
    """Return what the counts of a method's stream are called."""
    return f"{method} | {trial}"


def count_trials(findings: Mapping[str, Any], methods: Sequence[str]) -> dict[str, int]:
    """Return how many orders of the stream, from the first on, each method has met; who met none is not in.

    Example:
        >>> count_trials({"test | 0": {}, "test | 1": {}, "test | 3": {}}, ["source", "test"])
        {'test': 2}
    """
    counts: dict[str, int] = {}
    for name in methods:
        n = next(trial for trial in count() if name_stream(name, trial) not in findings)
        counts |= {name: n} if n else {}
    return counts


def build_rows(findings: Mapping[str, Any], n_trials: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return a row a method: means over the orders of the stream, with their standard errors.

    Args:
        findings: Counts, by names of `name_stream`.
        n_trials: Orders that count, of each method, in the order of the rows.
    """
    rows = []
    for name, n in n_trials.items():
        trials = [measure(findings[name_stream(name, trial)]) for trial in range(n)]
        columns = {kind: [trial[kind] for trial in trials] for kind in KINDS}
        found = {kind: [value for value in values if value is not None] for kind, values in columns.items()}
        stderr = {kind: standard_error(values) for kind, values in found.items()} if n > 1 else None
        rows.append(
            {"method": name}
            | {kind: mean(values) for kind, values in found.items()}
            | {"n_trials": n, "stderr": stderr}
        )
    return rows


def measure(counts: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the percentages of one stream: of known classes right, of outside images rejected, their harmonic mean.

    Example:
        >>> measure({"right": 6, "n_weak": 10, "rejected": 3, "n_strong": 4})
        {'acc_s': 60.0, 'acc_n': 75.0, 'acc_h': 66.66666666666667}
        >>> measure({"right": 6, "n_weak": 10, "rejected": 0, "n_strong": 0})["acc_h"] is None
        True
    """
    acc_s = 100 * counts["right"] / counts["n_weak"]
    if not counts["n_strong"]:
        return {"acc_s": acc_s, "acc_n": None, "acc_h": None}
    acc_n = 100 * counts["rejected"] / counts["n_strong"]
    return {"acc_s": acc_s, "acc_n": acc_n, "acc_h": 2 * acc_s * acc_n / (acc_s + acc_n) if acc_s + acc_n else 0.0}
