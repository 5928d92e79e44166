"""What a sweep's state comes to, as text: jobs by kind and state, failures, time, disk."""

from __future__ import annotations

import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from daft_domainbed.errors import UsageError
from daft_domainbed.host.sizes import measure_network
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.kinds import estimate_seconds, name_cause, name_kind
from daft_domainbed.launch.states import KINDS, State
from daft_domainbed.methods import QUESTIONS, STUDENT, find_method
from daft_domainbed.runtime.durations import format_duration
from daft_domainbed.runtime.layout import DONE_FILE
from daft_domainbed.runtime.sizes import compare_sizes
from daft_domainbed.training.prepare import prepare

_FAILURES_SHOWN = 10
_SECONDS_OF_RATE = 3600.0
_ANY_NUMBER_OF_CLASSES = 10  # makes no difference worth the reading of the data


def format_counts(jobs: Sequence[Job], states: Mapping[str, State]) -> str:
    """Return a table of how many jobs of each kind are in each state."""
    counts: dict[str, Counter[str]] = {}
    for job in jobs:
        counts.setdefault(name_kind(job), Counter())[states[job.folder].kind] += 1
    counts["all"] = sum(counts.values(), Counter())
    shown = [kind for kind in KINDS if counts["all"][kind]]
    width = max(map(len, counts))
    lines = [f"{'':<{width}}" + "".join(f"  {kind:>12}" for kind in (*shown, "all"))]
    for name, count in counts.items():
        cells = [*(count[kind] for kind in shown), count.total()]
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>12}" for cell in cells))
    return "\n".join(lines)


def format_failures(jobs: Sequence[Job], states: Mapping[str, State]) -> str:
    """Return the first causes of failures, a line each, those that only follow from another one last."""
    failed = [(states[job.folder].reason, job.folder) for job in jobs if states[job.folder].kind == "failed"]
    failed.sort(key=lambda entry: entry[0].startswith("its teacher "))
    by_cause: dict[str, list[tuple[str, str]]] = {}
    for reason, folder in failed:
        by_cause.setdefault(name_cause(reason), []).append((reason, folder))
    lines = []
    for (reason, folder), *others in list(by_cause.values())[:_FAILURES_SHOWN]:
        more = f" and {len(others)} more" if others else ""
        lines.append(f"failed: {folder}{more}: {reason}")
    if len(by_cause) > _FAILURES_SHOWN:
        lines.append(f"... and {len(by_cause) - _FAILURES_SHOWN} more causes")
    return "\n".join(lines)


def format_time(root: Path, jobs: Sequence[Job], states: Mapping[str, State]) -> str:
    """Return the rate of the last hour and the time left, as far as finished jobs of each kind tell."""
    now, ends = time.time(), []
    for job in jobs:
        if states[job.folder].kind == "done":
            with suppress(OSError):
                ends.append((root / job.folder / DONE_FILE).stat().st_mtime)
    recent = [end for end in ends if now - end < _SECONDS_OF_RATE]
    parts = [f"{len(recent)} jobs done in the last hour"] if recent else []
    left = estimate_seconds_left(jobs, states)
    if left is None:
        parts.append("time left: known once a job of each kind is done")
    elif left:
        running = sum(state.kind == "running" for state in states.values())
        parts.append(f"time left: {format_duration(left)} of work")
        if running > 1:
            parts[-1] += f", about {format_duration(left / running)} with {running} jobs at a time"
    return "; ".join(parts)


def estimate_seconds_left(jobs: Sequence[Job], states: Mapping[str, State]) -> float | None:
    """Return the seconds of work left, of jobs that are begun only what is left of them; None while that is unknown."""
    took: dict[str, list[float]] = defaultdict(list)
    left: dict[str, float] = defaultdict(float)
    for job in jobs:
        kind, state = name_kind(job), states[job.folder]
        if state.seconds is not None:
            took[kind].append(state.seconds)
        if state.kind not in ("done", "failed"):
            left[kind] += 1 - (state.step or 0) / job.args.steps if job.args.steps else 1.0
    return estimate_seconds(left, took)


def format_disk(root: Path, jobs: Sequence[Job], states: Mapping[str, State]) -> str:
    """Return the disk in use and what it may come to, from finished jobs of each kind, else from their weights."""
    by_folder = {job.folder: job for job in jobs}
    sizes = {job.folder: measure_folder(root / job.folder) for job in jobs}
    done: dict[str, list[int]] = defaultdict(list)
    for job in jobs:
        if states[job.folder].kind == "done" and sizes[job.folder]:
            done[name_kind(job)].append(sizes[job.folder])
    expected: dict[str, float] = {}
    for job in jobs:
        kind = name_kind(job)
        if kind in expected:
            continue
        if known := done[kind]:
            expected[kind] = sum(known) / len(known)
        else:
            weights = 0 if job.args.skip_model_save or job.stage in QUESTIONS else _count_weights(job, by_folder)
            # Two checkpoints, model.pkl and model_best.pkl, of four bytes a weight.
            expected[kind] = math.nan if weights is None else 8.0 * weights
    used = sum(sizes.values())
    whole = used + sum(
        # In this order, in which NaN stays what it is.
        max(expected[name_kind(job)] - sizes[job.folder], 0.0)
        for job in jobs
        if states[job.folder].kind != "done"
    )
    text = f"disk: {format_bytes(used)} in use"
    if any(state.kind != "done" for state in states.values()) and not math.isnan(whole):
        text += f", about {format_bytes(whole)} when all is done"
    return text


def _count_weights(job: Job, by_folder: Mapping[str, Job]) -> int | None:
    """Return how many parameters a job's model has, or None where it cannot be built without its data."""
    return _measure(job, by_folder).get("parameters")


def _measure(job: Job, by_folder: Mapping[str, Job]) -> dict[str, int]:
    """Return how large the network of a job is: its own, or that of the model that it starts from."""
    starts = [] if find_method(job.args.algorithm).has_own_architecture else job.needs[:1]
    if starts and starts[0] in by_folder:
        return _measure(by_folder[starts[0]], by_folder)
    try:
        run = prepare(job.args)
    except (UsageError, OSError):  # its data may have moved, and an estimate is not worth a failure
        return {}
    shape = run.dataset.input_shape
    return measure_network(run.host, job.args.algorithm, run.hparams, shape, _ANY_NUMBER_OF_CLASSES) if shape else {}


def list_size_warnings(jobs: Sequence[Job]) -> list[str]:
    """Return a line for each algorithm on a data set whose students are not smaller than their teachers."""
    by_folder, warned = {job.folder: job for job in jobs}, {}
    for job in jobs:
        key = (job.args.dataset, job.args.algorithm)
        needs = [by_folder[need] for need in job.needs if need in by_folder]
        if job.stage != STUDENT or key in warned or not find_method(job.args.algorithm).has_own_architecture:
            continue
        own = _measure(job, by_folder) if needs else {}
        lines = (compare_sizes(key[1], own, _measure(need, by_folder)) for need in needs)
        warned[key] = next(filter(None, lines), "")
    return [f"{dataset}: {line}" for (dataset, _), line in warned.items() if line]


def measure_folder(folder: Path) -> int:
    """Return the bytes of the files in a folder; none where there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())
    except OSError:
        return 0


def format_bytes(size: float) -> str:
    """Return a size in the unit that suits it.

    Example:
        >>> [format_bytes(size) for size in (900, 2_300_000, 45_000_000_000)]
        ['900 B', '2.3 MB', '45 GB']
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5 or unit == "GB":
            break
        size /= 1000
    return f"{size:.1f} {unit}" if size < 9.95 and unit != "B" else f"{size:.0f} {unit}"
