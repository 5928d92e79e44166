"""How long a sweep trained: by stage, each teacher once."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from daft_domainbed.results.lineage import trace_teachers
from daft_domainbed.results.plans import order_algorithms
from daft_domainbed.results.sweeps import Sweep
from daft_domainbed.results.values import is_number


class Cost(NamedTuple):
    """Training time of a stage: jobs, median and sum in seconds of those that recorded it, share of all in percent."""

    stage: str
    jobs: int
    median: float | None
    total: float | None
    share: float


def add_up_costs(sweep: Sweep) -> list[Cost]:
    """Add up training times by stage, teachers first."""
    teachers = _collect_teachers(sweep)
    stages = {f"{name} teacher": [*teachers[name].values()] for name in order_algorithms(None, teachers)}
    for name in order_algorithms(sweep.plan, (run.key.algorithm for run in sweep.runs)):
        stages[f"{name} student"] = [run.seconds for run in sweep.runs if run.key.algorithm == name]
    known = {stage: [value for value in values if value is not None] for stage, values in stages.items()}
    everything = sum(map(sum, known.values())) or 1.0
    return [
        Cost(
            stage,
            len(values),
            median(known[stage]) if known[stage] else None,
            sum(known[stage]) if known[stage] else None,
            100 * sum(known[stage]) / everything,
        )
        for stage, values in stages.items()
    ]


def _collect_teachers(sweep: Sweep) -> dict[str, dict[str, float | None]]:
    """Return seconds by algorithm and teacher; one outside the sweep's own store counts as its students recorded it."""
    seconds: dict[str, dict[str, float | None]] = {}
    for run in sweep.teachers.values():
        seconds.setdefault(run.key.algorithm, {})[run.folder] = run.seconds
    for run in sweep.runs:
        for teacher in trace_teachers(sweep, run):
            recorded = teacher.recorded.get("seconds")
            if not teacher.run and is_number(recorded):
                seconds.setdefault(teacher.algorithm, {})[teacher.id] = float(recorded)
    return seconds
