"""What is known of a sweep: the runs that count, the teachers beside them, and what is missing.

Nothing here raises because of what a file holds. What cannot be used is left out and said in `Sweep.notes`.

Which runs count: with a plan, the planned runs that are done. A half-trained run would bias the selection (its last
checkpoint is not the last, its best one may be to come), so it counts in nothing but `Sweep.missing`, and a folder
that the plan does not know is never mixed in. Without a plan (a folder of DomainBed's own sweep, or of single runs)
every run counts, done or not, as DomainBed counts them, and a note says how many are not done.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from daft_domainbed.errors import UsageError
from daft_domainbed.results.labels import label_datasets
from daft_domainbed.results.missing import Missing, list_missing
from daft_domainbed.results.plans import Plan, are_names, read_plan, show_names
from daft_domainbed.results.records import Note, Run, RunKey, read_run
from daft_domainbed.results.values import as_list
from daft_domainbed.runtime.layout import PLAN_FILE, RECORDS_FILE, SLURM_FOLDER, TEACHERS_FOLDER


@dataclass(frozen=True)
class Sweep:
    """Everything that is known about a sweep.

    Attributes:
        root: Its folder.
        plan: Its plan; None where there is no plan.json.
        environments: Names of the domains of each data set.
        runs: The students that count (see the module), sorted by key.
        teachers: The teachers in the sweep's own store, by id.
        missing: Planned runs that are not done.
        notes: What was left out or taken as it is.
    """

    root: Path
    plan: Plan | None
    environments: dict[str, list[str]]
    runs: list[Run]
    teachers: dict[str, Run]
    missing: list[Missing]
    notes: list[Note]


def read_sweep(root: Path, weights: str = "plain") -> Sweep:
    """Read the folder of a sweep, or of a single run.

    Args:
        root: The folder.
        weights: Whose accuracies are the students': the "plain" weights', or the "averaged" ones'.

    Raises:
        UsageError: There is no such folder, or neither a plan nor a readable run in it.
    """
    if not root.is_dir():
        raise UsageError(f"--input_dir {root} is not a folder: give the --output_dir of a sweep or of a run.")
    notes: list[Note] = []
    if (root / RECORDS_FILE).is_file():
        plan, folders, store = None, ["."], root.resolve().parent
    else:
        plan, store = read_plan(root, notes), root
        folders = _list_students(root, plan, notes)
    stored, outside = _list_teachers(store, plan)
    students = _read_runs(root, folders, notes, plan, weights)
    teachers = _read_runs(store, stored, notes, plan)
    # Teachers in a store outside the sweep show whether runs are done, nothing else: the tables are the sweep's own.
    others = _read_runs(root, outside, [], plan)
    planned = [run.args for run in plan.runs.values()] if plan else []
    labels = label_datasets([*planned, *(run.args for run in (*students, *teachers))])
    plan = plan and plan.relabel(labels)
    students, teachers = ([replace(run, key=run.key.relabel(labels)) for run in runs] for runs in (students, teachers))

    environments = _name_environments(plan, [*students, *teachers])
    students, teachers = (_drop_misfits(runs, environments, notes) for runs in (students, teachers))
    missing = list_missing(root, plan, [*students, *teachers, *others]) if plan else []
    students = [run for run in students if run.is_done] if plan else _drop_doubles(students, notes)
    _note_unfinished(students, notes)
    if not plan and not students:
        why = "".join(f"; {note.path}: {note.why}" for note in notes[:3])
        raise UsageError(f"--input_dir {root} holds no run that can be read{why}.")
    students.sort(key=lambda run: run.key)
    by_id = {PurePosixPath(run.folder).name: run for run in teachers}
    return Sweep(root, plan, environments, students, by_id, missing, notes)


def _list_students(root: Path, plan: Plan | None, notes: list[Note]) -> list[str]:
    """List the folders of runs beside the teachers; those that a plan does not know are noted."""
    folders = [name for name in _list_folders(root) if name != TEACHERS_FOLDER]
    if plan is None:
        return folders
    known = {SLURM_FOLDER, *(PurePosixPath(folder).parts[0] for folder in plan.runs)}
    notes += [Note(folder, f"not in {PLAN_FILE}; left out") for folder in folders if folder not in known]
    return [folder for folder in folders if folder in plan.runs]


def _list_teachers(store: Path, plan: Plan | None) -> tuple[list[str], list[str]]:
    """List the folders of teachers: those in the sweep, relative to it, and the planned ones outside of it."""
    stored = [f"{TEACHERS_FOLDER}/{name}" for name in _list_folders(store / TEACHERS_FOLDER)]
    planned = [run.folder for run in plan.runs.values() if run.is_teacher] if plan else []
    outside = [folder for folder in planned if os.path.isabs(folder)]
    elsewhere = [folder for folder in planned if folder not in {*stored, *outside} and (store / folder).is_dir()]
    return stored + elsewhere, outside


def _list_folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _read_runs(
    root: Path, folders: Iterable[str], notes: list[Note], plan: Plan | None, weights: str = "plain"
) -> list[Run]:
    """Read the runs in folders; those that a plan has otherwise are noted, and so are folders without a run."""
    runs = []
    for folder in folders:
        planned = plan.runs.get(folder) if plan else None
        run_notes: list[Note] = []
        run = read_run(root, folder, run_notes, weights)
        if run and planned and run.key != planned.key:
            why = f"holds {run.key.describe()}, but {PLAN_FILE} has {planned.key.describe()} there; left out"
            run_notes.append(Note(folder, why))
        elif run:
            runs.append(run)
        elif not run_notes and not planned:
            run_notes.append(Note(folder, f"not a run: no {RECORDS_FILE}; left out"))
        notes += run_notes
    return runs


def _name_environments(plan: Plan | None, runs: list[Run]) -> dict[str, list[str]]:
    """Name each data set's domains: from the plan, else from a run's first record, else by number."""
    environments = dict(plan.environments) if plan else {}
    for dataset in {run.key.dataset for run in runs} - environments.keys():
        same = [run for run in runs if run.key.dataset == dataset]
        (n_envs, _), *_ = Counter(run.n_envs for run in same).most_common(1)
        names = (as_list(run.first.get("environments")) for run in same)
        sound = (show_names(found) for found in names if len(found) == n_envs and are_names(found))
        environments[dataset] = next(sound, _number_environments(n_envs))
    for planned in plan.runs.values() if plan else ():
        n_envs = max(planned.key.test_envs, default=0) + 1
        environments.setdefault(planned.key.dataset, _number_environments(n_envs))
    return environments


def _number_environments(count: int) -> list[str]:
    return [f"env{e}" for e in range(count)]


def _drop_misfits(runs: list[Run], environments: dict[str, list[str]], notes: list[Note]) -> list[Run]:
    """Drop runs of another environment count than their data set has in this sweep."""
    kept = []
    for run in runs:
        n_envs = len(environments[run.key.dataset])
        if run.n_envs == n_envs:
            kept.append(run)
        else:
            why = f"{run.n_envs} environments, but {run.key.dataset} has {n_envs} in this sweep; left out"
            notes.append(Note(run.folder, why))
    return kept


def _drop_doubles(runs: list[Run], notes: list[Note]) -> list[Run]:
    """Keep one of the runs with the same key, done before not done, then by name: two backbones share no row."""
    kept: dict[RunKey, Run] = {}
    for run in sorted(runs, key=lambda run: (not run.is_done, run.folder)):
        other = kept.setdefault(run.key, run)
        if other is not run:
            notes.append(Note(run.folder, f"the same job as {other.folder} ({run.key.describe()}); left out"))
    return list(kept.values())


def _note_unfinished(runs: list[Run], notes: list[Note]) -> None:
    unfinished = [run.folder for run in runs if not run.is_done]
    if unfinished:
        more = f" (and {len(unfinished) - 1} more)" if len(unfinished) > 1 else ""
        notes.append(Note(unfinished[0] + more, f"not done; without a {PLAN_FILE} it counts as far as it got"))
