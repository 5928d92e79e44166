"""The plan of a sweep in its folder: written, read again, grown; never turned into another sweep's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from daft_domainbed.arguments import SweepArgs, TrainArgs, get_defaults, get_identity, list_differences
from daft_domainbed.errors import UsageError
from daft_domainbed.host.contract import describe_dataset, find_host
from daft_domainbed.hparams import parse_json
from daft_domainbed.launch.job import Job
from daft_domainbed.methods import STUDENT
from daft_domainbed.runtime.files import write_text
from daft_domainbed.runtime.layout import PLAN_FILE, QUEUE_FILE, RECORDS_FILE
from daft_domainbed.runtime.locks import acquire, is_claimed
from daft_domainbed.training.first_network import keep_first_network

SCHEMA = 2
_SMALLER_STUDENTS = 2  # the schema from which on small images of one's own have the smaller student


def _merge(old: Iterable[str], new: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*old, *new]))


# These may grow from one launch of a sweep to the next; with anything else changed it would be another sweep.
_MAY_GROW: dict[str, Callable[[Any, Any], Any]] = {
    "datasets": _merge,
    "algorithms": _merge,
    "n_trials": max,
    "n_trials_from": min,
    "n_hparams": max,
    "n_hparams_from": min,
}


def write_plan(sweep: SweepArgs, jobs: list[Job]) -> None:
    """Store a sweep's plan in its folder; a sweep may grow, but not become another one.

    Raises:
        UsageError: The folder holds a sweep with other arguments.
    """
    root = Path(sweep.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    with acquire(root, wait=True):  # another launch may be writing it
        _write_plan(root / PLAN_FILE, sweep, jobs)


def _read_begun(path: Path, sweep: SweepArgs) -> dict[str, Any] | None:
    """Return the stored plan that a sweep grows from, or None where there is none of which anything came."""
    old = _read_plan(path)
    is_queued = (path.parent / QUEUE_FILE).is_file()
    if old is None or not (is_queued or any(_is_begun(path.parent / job["folder"]) for job in old["jobs"])):
        return None  # most likely it was a mistake
    _check_growth(old["args"], sweep, path.parent)
    return old


def _write_plan(path: Path, sweep: SweepArgs, jobs: list[Job]) -> None:
    args, old = get_identity(sweep), _read_begun(path, sweep)
    environments = name_environments(sweep)
    known = {job.folder for job in jobs}
    content = {
        "schema": old["schema"] if old else SCHEMA,
        "args": args
        | ({name: merge(old["args"][name], args[name]) for name, merge in _MAY_GROW.items()} if old else {}),
        "data": (old or {}).get("data", {}) | sweep.data,
        "environments": (old or {}).get("environments", {}) | environments,
        "jobs": [asdict(job) for job in jobs]
        + [job for job in (old or {}).get("jobs", []) if job["folder"] not in known],
    }
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def name_environments(sweep: SweepArgs) -> dict[str, list[str]]:
    """Return the names of the domains of each data set of a sweep."""
    host, user = find_host(sweep.host), parse_json(sweep.hparams)
    paths = {name: place["data_path"] for name, place in sweep.data.items()}
    return {name: list(describe_dataset(host, name, user, paths.get(name)).environments) for name in sweep.datasets}


def read_environments(root: Path) -> dict[str, list[str]]:
    """Return the names of the domains of each data set of a stored sweep.

    Raises:
        UsageError: The folder has no plan, or one that cannot be read.
    """
    environments: dict[str, list[str]] = _read_stored(root).get("environments", {})
    return environments


def read_begun_data(root: Path) -> dict[str, dict[str, str | None]]:
    """Return `data_id` and `data_path` of the folders of images of which a sweep has records already, by name.

    Raises:
        UsageError: The plan cannot be read.
    """
    plan = _read_plan(root / PLAN_FILE)
    if plan is None:
        return {}
    unknown = {"data_id": None, "data_path": None}
    begun = {job["args"]["dataset"] for job in plan["jobs"] if _is_begun(root / job["folder"])}
    return {name: plan.get("data", {}).get(name, unknown) for name in sorted(begun) if name.startswith("folder:")}


def read_working_folder(root: Path) -> str:
    """Return the folder from which a sweep was begun, against which relative paths in its hyperparameters count.

    Raises:
        UsageError: The plan cannot be read.
    """
    jobs = (_read_plan(root / PLAN_FILE) or {"jobs": []})["jobs"]
    return next((job["cwd"] for job in jobs if job.get("cwd") and _is_begun(root / job["folder"])), os.getcwd())


def list_planned(root: Path) -> set[str]:
    """Return the folders of all jobs of the plan of a sweep that is under way.

    Raises:
        UsageError: The plan cannot be read.
    """
    folders = {job["folder"] for job in (_read_plan(root / PLAN_FILE) or {"jobs": []})["jobs"]}
    return folders if any(_is_begun(root / folder) for folder in folders) else set()


def _is_begun(folder: Path) -> bool:
    return (folder / RECORDS_FILE).is_file() or is_claimed(folder)


def read_sweep_args(root: Path) -> dict[str, Any]:
    """Return the arguments that a stored sweep was planned with, without what does not make it another sweep.

    Raises:
        UsageError: The folder has no plan, or one that cannot be read.
    """
    stored = _read_stored(root)
    args: dict[str, Any] = stored["args"] | {"data": stored.get("data", {})}
    return args


def read_jobs(root: Path) -> list[Job]:
    """Return the jobs of a stored plan, teachers before those that need them.

    Raises:
        UsageError: The folder has no plan, or one that cannot be read.
    """
    plan = _read_stored(root)
    try:
        jobs = [Job(**job | {"args": TrainArgs(**job["args"])}) for job in plan["jobs"]]
    except TypeError as error:
        raise UsageError(f"{root / PLAN_FILE} is of another version ({error}): launch the sweep again") from error
    if plan["schema"] >= _SMALLER_STUDENTS:
        return jobs
    return [replace(job, args=keep_first_network(job.args)) if job.stage == STUDENT else job for job in jobs]


def check_plan(sweep: SweepArgs) -> bool:
    """Make sure that a sweep's folder holds no other sweep.

    Returns:
        Whether it goes on with one that was begun when students had other default networks.

    Raises:
        UsageError: It holds another one.
    """
    old = _read_begun(Path(sweep.output_dir) / PLAN_FILE, sweep)
    return old is not None and old["schema"] < _SMALLER_STUDENTS


def _read_stored(root: Path) -> dict[str, Any]:
    plan = _read_plan(root / PLAN_FILE)
    if plan is None:
        raise UsageError(f"{root} holds no sweep: it has no {PLAN_FILE}; 'daft-domainbed sweep launch' writes it")
    return plan


def _read_plan(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
        plan["args"] = get_defaults(SweepArgs) | dict(plan["args"])  # an older plan lacks what came later
        plan["schema"] = int(plan.get("schema", 1))
        plan["jobs"] = [job | {"folder": job["folder"]} for job in plan["jobs"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is no plan of a sweep ({error}): delete it, the runs beside it are kept") from error
    return plan


def _check_growth(old: dict[str, Any], sweep: SweepArgs, folder: Path) -> None:
    for name in ("n_trials", "n_hparams"):
        first, end = getattr(sweep, f"{name}_from"), getattr(sweep, name)
        # An empty range has a message of its own.
        if first < end and (first > old[name] or end < old[f"{name}_from"]):
            raise UsageError(
                f"{folder} holds {name[2:]} {old[f'{name}_from']} to {old[name] - 1}, and {first} to {end - 1} would "
                f"leave a gap: fill it with --{name}_from, or choose another --output_dir"
            )
    if different := list_differences(old, sweep, ignored=tuple(_MAY_GROW)):
        raise UsageError(
            f"{folder} holds a sweep with other arguments ({'; '.join(different)}): choose another --output_dir"
        )
