"""What a sweep set out to do: the runs in its plan.json, which needs which, and in what order algorithms are shown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from daft_domainbed.methods import METHODS, QUESTIONS, STUDENT
from daft_domainbed.results.asked import LEAVE_OUT, SINGLE_SOURCE
from daft_domainbed.results.records import Note, RunKey
from daft_domainbed.results.settings import Setting, read_given
from daft_domainbed.results.values import as_dict, as_list, is_name, show_name
from daft_domainbed.runtime.layout import PLAN_FILE

MOST_STAGES = 8  # behind one another: a bound for plans whose teachers need each other in a circle


@dataclass(frozen=True)
class PlannedRun:
    """A run that a plan asks for.

    Attributes:
        stage: "student", or which kind of teacher it trains.
        folder: Its path, relative to the sweep.
        needs: Paths of the teachers that it needs, relative to the sweep.
        key: Data set, algorithm, held-out domains and seeds.
        args: The arguments of `train`.
        kind: "leave-out" or "single-source", as it was asked for.
        given: What it is given beside the draw.
    """

    stage: str
    folder: str
    needs: tuple[str, ...]
    key: RunKey
    args: dict[str, Any]
    kind: str = LEAVE_OUT
    given: Setting = ()

    def below(self, prefix: str) -> PlannedRun:
        """Return the same run with the paths of its sweep's folders below another one."""
        folder, *needs = (path if os.path.isabs(path) else prefix + path for path in (self.folder, *self.needs))
        return replace(self, folder=folder, needs=tuple(needs))

    @property
    def is_teacher(self) -> bool:
        """Whether it trains a teacher."""
        return self.stage != STUDENT


@dataclass(frozen=True)
class Plan:
    """What a sweep set out to do.

    Attributes:
        args: The arguments of the sweep.
        environments: Names of the domains of each data set.
        runs: The planned runs, by folder.
        parts: The arguments of each sweep where several are read as one.
    """

    args: dict[str, Any]
    environments: dict[str, list[str]]
    runs: dict[str, PlannedRun]
    parts: list[dict[str, Any]] = field(default_factory=list)

    def below(self, prefix: str) -> Plan:
        """Return the same plan with the paths of its folders below another one."""
        runs = [run.below(prefix) for run in self.runs.values()]
        return Plan(self.args, self.environments, {run.folder: run for run in runs})

    def relabel(self, labels: Mapping[str, str]) -> Plan:
        """Return the same plan with its data sets called as in tables."""
        return Plan(
            self.args | {"datasets": [labels.get(name, name) for name in self.args["datasets"]]},
            {labels.get(name, name): envs for name, envs in self.environments.items()},
            {folder: replace(run, key=run.key.relabel(labels)) for folder, run in self.runs.items()},
        )

    def list_args(self) -> list[dict[str, Any]]:
        """Return the arguments of every sweep that it is of."""
        return self.parts or [self.args]

    def measure_depths(self) -> dict[str, int]:
        """Return, by folder, how many teachers stand one behind the other behind each run."""
        depths = dict.fromkeys(self.runs, 0)
        for _ in range(MOST_STAGES):
            depths = {
                folder: max((1 + depths[need] for need in run.needs if need in depths), default=0)
                for folder, run in self.runs.items()
            }
        return depths


def read_plan(root: Path, notes: list[Note]) -> Plan | None:
    """Read the plan of a sweep; None where there is none that can be used, which is noted.

    Args:
        root: The sweep's folder.
        notes: A list, to which is added why a plan cannot be used.
    """
    path = root / PLAN_FILE
    if not path.exists():
        return None
    try:
        plan = json.loads(path.read_bytes())
        entries = [as_dict(entry) for entry in plan["jobs"]]
        args = as_dict(plan.get("args"))
        runs = [_read_planned_run(entry, args) for entry in entries if entry["stage"] not in QUESTIONS]
        known = {run.args["dataset"]: run.key.dataset for run in runs}
        environments = as_dict(plan.get("environments"))
        named = {known.get(name, name): show_names(envs) for name, envs in environments.items() if are_names(envs)}
        args["datasets"] = [known.get(name, name) for name in as_list(args.get("datasets")) if is_name(name)]
        return Plan(args, named, {run.folder: run for run in runs})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"cannot be used ({type(error).__name__}: {error}); read as a folder without a plan"
        notes.append(Note(PLAN_FILE, why))
        return None


def _read_planned_run(entry: dict[str, Any], sweep: dict[str, Any]) -> PlannedRun:
    return PlannedRun(
        stage=str(entry["stage"]),
        folder=PurePosixPath(entry["folder"]).as_posix(),
        needs=tuple(PurePosixPath(need).as_posix() for need in entry.get("needs") or ()),
        key=RunKey.of(entry["args"]),
        args=entry["args"],
        kind=SINGLE_SOURCE if sweep.get("single_source") else LEAVE_OUT,
        given=read_given(entry["args"], sweep.get("chosen") if entry["stage"] == STUDENT else None),
    )


def are_names(value: object) -> bool:
    """Whether a value is a list of names."""
    return isinstance(value, list) and all(map(is_name, value))


def show_names(names: list[str]) -> list[str]:
    """Return names as tables show them."""
    return list(map(show_name, names))


def order_algorithms(plan: Plan | None, algorithms: Iterable[str]) -> list[str]:
    """Order algorithms as the sweep was asked for them, without a plan as in the table of methods; then by alphabet."""
    asked = as_list(plan.args.get("algorithms")) if plan else list(METHODS)
    return sorted(set(algorithms), key=lambda name: (asked.index(name) if name in asked else len(asked), name))
