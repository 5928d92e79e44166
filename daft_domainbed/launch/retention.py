"""Which weights of a finished sweep are kept: those that a selection chose, and the teachers behind them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from daft_domainbed.launch.job import Job
from daft_domainbed.launch.states import is_done
from daft_domainbed.runtime.locks import is_claimed


def remove_weights(root: Path, jobs: Sequence[Job], chosen: Iterable[str]) -> int:
    """Remove the weights of finished runs that nothing needs any more; records, which are the results, stay.

    Kept are the chosen runs, the teachers that they were made with, those that unfinished jobs wait for, and whatever
    lies in a store of teachers outside the sweep, which other sweeps may share. A teacher that a grown sweep needs
    again is trained again.

    Args:
        root: The sweep's folder.
        jobs: Its whole plan.
        chosen: The folders of students that a selection chose.

    Returns:
        The bytes that were freed.
    """
    needs = {job.folder: job.needs for job in jobs}
    kept = {*chosen, *(job.folder for job in jobs if not is_done(root / job.folder))}
    reached = list(kept)
    while reached:
        for need in needs.get(reached.pop(), []):
            if need not in kept:
                kept.add(need)
                reached.append(need)
    freed = 0
    for job in jobs:
        folder = root / job.folder
        if job.folder in kept or Path(job.folder).is_absolute() or is_claimed(folder):
            continue
        for path in [*folder.glob("model*.pkl")]:
            freed += path.stat().st_size
            path.unlink()
    return freed
