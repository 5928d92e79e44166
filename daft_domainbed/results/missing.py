"""Which planned runs are not done, and why."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from daft_domainbed.results.plans import Plan, PlannedRun, order_algorithms
from daft_domainbed.results.records import Run
from daft_domainbed.runtime.layout import DONE_FILE, FAILED_FILE, RECORDS_FILE, RESUME_FILE, read_failure


class Missing(NamedTuple):
    """A planned run that is not done, and why."""

    planned: PlannedRun
    reason: str


def list_missing(root: Path, plan: Plan, runs: Sequence[Run]) -> list[Missing]:
    """List the planned runs that are not done, teachers before those that need them, students last.

    A teacher without a folder is not missing where all runs that need it are done: it was removed after use, or lies in
    a store that did not come along with the sweep.

    Args:
        root: The sweep's folder.
        plan: The sweep's plan.
        runs: All runs that could be read.
    """
    by_folder = {run.folder: run for run in runs}
    depths = plan.measure_depths()
    done = {run.folder for run in runs if run.is_done}
    done |= _list_served(root, plan, done, depths)
    algorithms = order_algorithms(plan, (planned.key.algorithm for planned in plan.runs.values()))

    def rank(missing: Missing) -> tuple[object, ...]:
        folder, key = missing.planned.folder, missing.planned.key
        stage = depths[folder] if missing.planned.is_teacher else math.inf
        place = (key.dataset, stage, algorithms.index(key.algorithm))
        return (*place, key.test_envs, key.trial_seed, key.hparams_seed, folder)

    left = [planned for planned in plan.runs.values() if planned.folder not in done]
    return sorted((Missing(one, _say_why(root, one, by_folder.get(one.folder))) for one in left), key=rank)


def _list_served(root: Path, plan: Plan, done: set[str], depths: dict[str, int]) -> set[str]:
    """List the teachers without a folder that no run needs any more."""
    students: dict[str, set[str]] = {}
    for planned in plan.runs.values():
        for need in planned.needs:
            students.setdefault(need, set()).add(planned.folder)
    served: set[str] = set()
    for planned in sorted(plan.runs.values(), key=lambda planned: -depths[planned.folder]):
        is_served = planned.folder in students and students[planned.folder] <= done | served
        if planned.is_teacher and is_served and not (root / planned.folder).exists():
            served.add(planned.folder)
    return served


def _say_why(root: Path, planned: PlannedRun, run: Run | None) -> str:
    try:
        names = set(os.listdir(root / planned.folder))
    except OSError:
        names = set()
    if DONE_FILE in names and not run:
        return f"done, but its {RECORDS_FILE} cannot be used"
    if FAILED_FILE in names:
        return f"failed: {_explain_failure(root, planned)}"
    if run:
        steps = planned.args.get("steps")
        return f"incomplete at step {run.steps[-1]}" + (f" of {steps}" if steps else "")
    if names & {RECORDS_FILE, RESUME_FILE}:
        return "incomplete, before its first record"
    waits = [need for need in planned.needs if not (root / need / DONE_FILE).exists()]
    return f"waiting for teacher {PurePosixPath(waits[0]).name}" if waits else "not launched"


def _explain_failure(root: Path, planned: PlannedRun) -> str:
    line = "".join(c for c in read_failure(root / planned.folder) if c.isprintable()).strip()
    return cut_sweep_path(line, root, planned) or "no reason given"


def cut_sweep_path(text: str, root: Path, run: PlannedRun | Run) -> str:
    """Make the paths in a text relative to the sweep.

    Args:
        text: What a run recorded.
        root: Where the sweep is now.
        run: The run, whose arguments tell where the sweep was made.
    """
    roots = {str(root.resolve()), os.path.abspath(root)}
    made_in = run.args.get("output_dir")
    folder = run.folder.removeprefix(f"{root}/")  # where several sweeps are read as one
    if isinstance(made_in, str) and made_in.endswith(f"/{folder}"):
        roots.add(made_in.removesuffix(f"/{folder}"))
    if os.path.isabs(run.folder):
        roots.add(os.path.dirname(run.folder))
    for path in sorted(roots - {"", "/", "."}, key=len, reverse=True):
        text = re.sub(rf"(?<![\w./-]){re.escape(path)}/", "", text)
        if "/" in path:  # else it may be any word
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w./-])", ".", text)
    return text
