"""What a sweep's state comes to: jobs by stage and state, disk, time; for `status`, and before `launch` asks."""

from __future__ import annotations

import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from daft_domainbed import hparams, plugin
from daft_domainbed.arguments import resolve_hparams
from daft_domainbed.launch.plan import Job
from daft_domainbed.launch.states import KINDS, State
from daft_domainbed.randomness import preserve_states
from daft_domainbed.run_folder import DONE_FILE

_FAILURES_SHOWN = 10
_SECONDS_OF_RATE = 3600.0
_ANY_NUMBER_OF_CLASSES = 10  # makes no difference worth the reading of the data


def name_kind(job: Job) -> str:
    """Return what a job is, without its seeds: jobs of one kind take about the same time and room."""
    what = {"erm_teacher": "ERM teacher", "aft_teacher": "AFT teacher", "student": job.args.algorithm}[job.stage]
    return f"{what}, {job.args.dataset}"


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
    """Return the first failures, a line each, those that only follow from another one last."""
    failed = [(states[job.folder].reason, job.folder) for job in jobs if states[job.folder].kind == "failed"]
    failed.sort(key=lambda entry: entry[0].startswith("its teacher "))
    lines = [f"failed: {folder}: {reason}" for reason, folder in failed[:_FAILURES_SHOWN]]
    if len(failed) > _FAILURES_SHOWN:
        lines.append(f"... and {len(failed) - _FAILURES_SHOWN} more")
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
    """Return the work left, from the mean of the finished jobs of each kind; None while a kind has none."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for job in jobs:
        if (took := states[job.folder].seconds) is not None:
            seconds[name_kind(job)].append(took)
    total = 0.0
    for job in jobs:
        state = states[job.folder]
        if state.kind in ("done", "failed"):
            continue
        if not (known := seconds[name_kind(job)]):
            return None
        share = 1 - (state.step or 0) / job.args.steps if job.args.steps else 1.0
        total += share * sum(known) / len(known)
    return total


def format_duration(seconds: float) -> str:
    """Return a time in the unit that suits it.

    Example:
        >>> [format_duration(seconds) for seconds in (40, 600, 7200, 400_000)]
        ['40 s', '10 min', '2.0 h', '111 h']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"


def format_disk(root: Path, jobs: Sequence[Job], states: Mapping[str, State]) -> str:
    """Return the disk in use and what it may come to, from finished jobs of each kind, else from their weights."""
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
            weights = 0 if job.args.skip_model_save else _count_weights(job)
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


def _count_weights(job: Job) -> int | None:
    """Return how many weights a job's model has, or None where it cannot be built without its data."""
    host = plugin.find_host(job.args.host)
    try:
        shape = plugin.get_input_shape(host, job.args.dataset)
        wanted = resolve_hparams(host, job.args, hparams.parse_json(job.args.hparams)) | {"weights": "none"}
        ours = job.args.algorithm in hparams.TEACHER_KINDS  # ERM's parameters, and a teacher that is not saved
        build = host.algorithms.ERM if ours else plugin.get_algorithm_class(host, job.args.algorithm)
        with torch.device("meta"), preserve_states():
            model = build(shape, _ANY_NUMBER_OF_CLASSES, 1, wanted)
    except Exception:  # an estimate is not worth a failure
        return None
    return sum(weight.numel() for weight in (*model.parameters(), *model.buffers()))  # each once, unlike state_dict()


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
