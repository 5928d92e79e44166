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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from daft_domainbed.errors import UsageError
from daft_domainbed.results.asked import SINGLE_SOURCE, Asked, Held, find_asked, guess_kind
from daft_domainbed.results.labels import label_datasets
from daft_domainbed.results.missing import Missing, list_missing
from daft_domainbed.results.plans import Plan, are_names, read_plan, show_names
from daft_domainbed.results.records import Note, Run, RunKey, read_run
from daft_domainbed.results.settings import Setting, is_given, read_given, read_networks
from daft_domainbed.results.values import as_list
from daft_domainbed.runtime.layout import PLAN_FILE, RECORDS_FILE, SLURM_FOLDER, TEACHERS_FOLDER


@dataclass(frozen=True)
class Sweep:
    """Everything that is known about a sweep, or about several that are read as one.

    Attributes:
        roots: Their folders.
        plan: Their plans as one; None where there is no plan.json.
        environments: Names of the domains of each data set.
        asked: Which domains are held out, by data set and kind.
        runs: The students that count (see the module), sorted by key.
        teachers: The teachers in the sweeps' own stores, by id; of a second one of that id by its folder.
        missing: Planned runs that are not done.
        notes: What was left out or taken as it is.
    """

    roots: list[Path]
    plan: Plan | None
    environments: dict[str, list[str]]
    asked: dict[tuple[str, str], Asked]
    runs: list[Run]
    teachers: dict[str, Run]
    missing: list[Missing]
    notes: list[Note]

    @property
    def name(self) -> str:
        """What the folders are called."""
        return ", ".join(root.resolve().name for root in self.roots)

    def find_teacher(self, teacher_id: str, root: Path | None) -> Run | None:
        """Return a teacher by its id, that of the student's own folder before others'."""
        own = self.teachers.get(f"{root}/{TEACHERS_FOLDER}/{teacher_id}")
        return own or self.teachers.get(teacher_id)


def read_sweep(root: Path, weights: str = "plain") -> Sweep:
    """Read the folder of a sweep, or of a single run, as `read_sweeps` does."""
    return read_sweeps([root], weights)


def read_sweeps(roots: Sequence[Path], weights: str = "plain") -> Sweep:
    """Read the folders of sweeps, or of single runs, as one sweep.

    Args:
        roots: The folders; what is in several of them counts once.
        weights: Whose accuracies are the students': the "plain" weights', or the "averaged" ones'.

    Raises:
        UsageError: There is no such folder, or neither a plan nor a readable run in it.
    """
    roots = list({root.resolve(): root for root in reversed(roots)}.values())[::-1]
    notes: list[Note] = []
    folders = [_read_folder(root, f"{root}/" if len(roots) > 1 else "", weights, notes) for root in roots]
    planned = [run for folder in folders if folder.plan for run in folder.plan.runs.values()]
    read = [run for folder in folders for run in (*folder.students, *folder.teachers)]
    labels = label_datasets([*(run.args for run in planned), *(run.args for run in read)])
    plan = _merge_plans([folder.plan.relabel(labels) for folder in folders if folder.plan])
    students, teachers = (
        [replace(run, key=run.key.relabel(labels)) for folder in folders for run in runs(folder)]
        for runs in (attrgetter("students"), attrgetter("teachers"))
    )
    missing = [
        m._replace(planned=replace(m.planned, key=m.planned.key.relabel(labels)))
        for folder in folders
        for m in folder.missing
    ]
    environments = _name_environments(plan, [*students, *teachers])
    students, teachers = (_drop_misfits(runs, environments, notes) for runs in (students, teachers))
    students = _drop_doubles(_guess_kinds(students, plan), notes)
    missing = _drop_done(missing, students)
    _note_unfinished([run for run in students if not plan or run.folder not in plan.runs], notes)
    students.sort(key=lambda run: run.key)
    asked = _find_asked(plan, students, environments)
    return Sweep(roots, plan, environments, asked, students, _name_teachers(teachers), missing, notes)


class _Folder(NamedTuple):
    """What was read from one folder, data sets by what identifies them; of planned students those that are done."""

    plan: Plan | None
    students: list[Run]
    teachers: list[Run]
    missing: list[Missing]


def _read_folder(root: Path, prefix: str, weights: str, notes: list[Note]) -> _Folder:
    """Read one folder; paths in what is returned begin with a prefix."""
    if not root.is_dir():
        raise UsageError(f"--input_dir {root} is not a folder: give the --output_dir of a sweep or of a run.")
    own: list[Note] = []
    if (root / RECORDS_FILE).is_file():
        plan, folders, store = None, ["."], root.resolve().parent
    else:
        plan, store = read_plan(root, own), root
        folders = _list_folders(root)
    stored, outside = _list_teachers(store, plan)
    students = _read_students(root, folders, own, plan, weights)
    teachers = _read_runs(store, stored, own, plan)
    # Teachers in a store outside the sweep show whether runs are done, nothing else: the tables are the sweep's own.
    others = _read_runs(root, outside, [], plan)
    missing = list_missing(root, plan, [*students, *teachers, *others]) if plan else []
    if not plan and not students:
        why = "".join(f"; {note.path}: {note.why}" for note in own[:3])
        raise UsageError(f"--input_dir {root} holds no run that can be read{why}.")
    notes += [Note(prefix + note.path, note.why) for note in own]
    return _Folder(
        plan and plan.below(prefix),
        [replace(run, folder=prefix + run.folder) for run in students],
        [replace(run, folder=prefix + run.folder) for run in teachers],
        [m._replace(planned=m.planned.below(prefix)) for m in missing],
    )


def _merge_plans(plans: Sequence[Plan]) -> Plan | None:
    """Return several plans as one, the first's order before the others'."""
    if len(plans) < 2:
        return plans[0] if plans else None
    merged = {
        name: list(dict.fromkeys(item for plan in plans for item in as_list(plan.args.get(name))))
        for name in ("algorithms", "datasets")
    }
    environments = {name: envs for plan in reversed(plans) for name, envs in plan.environments.items()}
    runs = {folder: run for plan in plans for folder, run in plan.runs.items()}
    return Plan(plans[0].args | merged, environments, runs, [plan.args for plan in plans])


def _guess_kinds(runs: list[Run], plan: Plan | None) -> list[Run]:
    """Return runs with their kinds and settings: as planned, else as far as runs tell themselves."""
    sets: dict[str, list[Held]] = {}
    for run in runs:
        sets.setdefault(run.key.dataset, []).append(run.key.test_envs)
    known = []
    for run in runs:
        planned = plan.runs.get(run.folder) if plan else None
        kind = planned.kind if planned else guess_kind(run.key.test_envs, run.n_envs, sets[run.key.dataset])
        given = planned.given if planned else read_given(run.args)
        networks = read_networks(run.hparams, run.teachers)
        known.append(replace(run, kind=kind, setting=given + networks))
    return known


def _find_asked(
    plan: Plan | None, runs: Iterable[Run], environments: dict[str, list[str]]
) -> dict[tuple[str, str], Asked]:
    """Return what was asked of each data set, by kind: what was planned, else what runs hold out."""
    sets: dict[tuple[str, str], list[Held]] = {}
    for planned in plan.runs.values() if plan else ():
        if not planned.is_teacher:
            sets.setdefault((planned.key.dataset, planned.kind), []).append(planned.key.test_envs)
    loose = [run for run in runs if not plan or run.folder not in plan.runs]
    seen = {(run.key.dataset, run.kind) for run in loose}
    for run in sorted(loose, key=lambda run: (len(run.key.test_envs), run.key.test_envs)):
        sets.setdefault((run.key.dataset, run.kind), []).append(run.key.test_envs)
    return {
        key: _ask(key[1], held_out, len(environments[key[0]]), is_loose=key in seen) for key, held_out in sets.items()
    }


def _ask(kind: str, sets: list[Held], n_envs: int, *, is_loose: bool) -> Asked:
    """Return what sets ask for; runs of no plan may be DomainBed's, whose pairs are validation alone."""
    singles = {env for held_out in sets if len(held_out) == 1 for env in held_out}
    pairs = [held_out for held_out in sets if len(held_out) == 2]
    if kind == SINGLE_SOURCE or not is_loose or not any(singles.intersection(pair) for pair in pairs):
        return find_asked(kind, sets, n_envs)
    return find_asked(kind, [held_out for held_out in sets if len(held_out) != 2], n_envs, pairs)


def _read_students(root: Path, folders: Sequence[str], notes: list[Note], plan: Plan | None, weights: str) -> list[Run]:
    """Read the runs beside the teachers; with a plan, those that are done, and others than its own are noted."""
    folders = [name for name in folders if name != TEACHERS_FOLDER]
    if plan is None:
        return _read_runs(root, folders, notes, None, weights)
    known = {SLURM_FOLDER, *(PurePosixPath(folder).parts[0] for folder in plan.runs)}
    planned = _read_runs(root, [folder for folder in folders if folder in plan.runs], notes, plan, weights)
    strange = _read_runs(root, [folder for folder in folders if folder not in known], notes, None, weights)
    for is_done, what in ((True, "counted, as where folders were merged"), (False, "not done; left out")):
        if found := [run.folder for run in strange if run.is_done == is_done]:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            notes.append(Note(found[0] + more, f"not in {PLAN_FILE}; {what}"))
    return [run for run in [*planned, *strange] if run.is_done]


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
    """Keep one of the runs of one job, done before not done, then by name; what is equal is a copy."""
    kept: dict[tuple[RunKey, str, Setting], Run] = {}
    for run in sorted(runs, key=lambda run: (not run.is_done, run.folder)):
        other = kept.setdefault((run.key, run.kind, run.setting), run)
        if other is run:
            continue
        why = "a copy of" if _is_copy(run, other) else "another run of the job of"
        notes.append(Note(run.folder, f"{why} {other.folder} ({run.key.describe()}); left out"))
    return list(kept.values())


def _drop_done(missing: Iterable[Missing], students: Iterable[Run]) -> list[Missing]:
    """Drop what another folder has, and of what several lack all but one."""
    done: dict[tuple[RunKey, str], list[Setting]] = {}
    for run in students:
        if run.is_done:
            done.setdefault((run.key, run.kind), []).append(run.setting)
    kept: dict[tuple[object, ...], Missing] = {}
    for one in missing:
        planned = one.planned
        name = PurePosixPath(planned.folder).name if planned.is_teacher else ""
        found = done.get((planned.key, planned.kind), [])
        if planned.is_teacher or not any(is_given(setting, planned.given) for setting in found):
            kept.setdefault((name, planned.key, planned.kind, planned.given), one)
    return list(kept.values())


def _name_teachers(teachers: Sequence[Run]) -> dict[str, Run]:
    """Return teachers by id; another one of the same id, which was trained elsewhere, by its folder."""
    named: dict[str, Run] = {}
    for run in teachers:
        other = named.setdefault(PurePosixPath(run.folder).name, run)
        if other is not run and not _is_copy(run, other):
            named[run.folder] = run
    return named


def _is_copy(run: Run, other: Run) -> bool:
    return np.array_equal(run.steps, other.steps) and np.array_equal(run.accs, other.accs)


def _note_unfinished(runs: list[Run], notes: list[Note]) -> None:
    unfinished = [run.folder for run in runs if not run.is_done]
    if unfinished:
        more = f" (and {len(unfinished) - 1} more)" if len(unfinished) > 1 else ""
        notes.append(Note(unfinished[0] + more, f"not done; without a {PLAN_FILE} it counts as far as it got"))
