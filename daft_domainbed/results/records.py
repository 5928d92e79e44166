"""Read the folder of a sweep: its plan and every run's results.jsonl, tolerantly and fast.

Nothing here raises because of what a file holds. What cannot be used is left out and said in `Sweep.notes`; only the
truncated last line of a run that is still writing goes without a word.

Which runs count: with a plan, the planned jobs that are done. A half-trained run would bias the selection (its last
checkpoint is not the last, its best one may be to come), so it counts in nothing but `Sweep.missing`, and a folder
that the plan does not know is never mixed in. Without a plan (a folder of DomainBed's own sweep, or of single runs)
every run counts, done or not, as DomainBed counts them, and a note says how many are not done.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import contains, itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from daft_domainbed.errors import UsageError

LOADERS: tuple[Callable[[bytes], Any], ...] = (json.loads,)
with contextlib.suppress(ImportError):
    from orjson import loads

    LOADERS = (loads, json.loads)  # orjson is faster, and refuses the NaN that DomainBed's writer leaves in a line

RESULTS, PLAN, TEACHERS, BESIDE = "results.jsonl", "plan.json", "teachers", "provenance.json"
LOGS = "slurm"  # what Slurm wrote of a sweep


class JobKey(NamedTuple):
    """What makes a run one of its kind within a sweep."""

    dataset: str
    algorithm: str
    test_envs: tuple[int, ...]
    trial_seed: int
    hparams_seed: int

    @classmethod
    def of(cls, args: object) -> JobKey:
        """Read the key from a run's arguments.

        Raises:
            ValueError: Says what is wrong with them.
        """
        args = as_dict(args)
        for name in ("dataset", "algorithm"):
            if not is_printable(args.get(name)):
                raise ValueError(f"args without {name}")
        for name in ("trial_seed", "hparams_seed"):
            if type(args.get(name)) is not int:
                raise ValueError(f"args without {name}")
        envs = args.get("test_envs")
        if not isinstance(envs, list) or any(type(e) is not int or e < 0 for e in envs) or len(set(envs)) < len(envs):
            raise ValueError("args without a list of test_envs")
        return cls(args["dataset"], args["algorithm"], tuple(sorted(envs)), args["trial_seed"], args["hparams_seed"])


class Note(NamedTuple):
    """Something that was left out or taken as it is: where (relative to the sweep), and why."""

    path: str
    why: str


@dataclass(frozen=True, eq=False)
class Run:
    """The checkpoints of one run, in the order of their steps.

    Attributes:
        folder: Relative to the sweep; "." for a single run.
        key: Data set, algorithm, held-out domains and seeds.
        first: The first record as it was written (with "machine", "teacher" ... where our engine wrote it).
        last: The last one.
        steps: Step of each checkpoint, [C].
        step_times: Mean seconds a step since the checkpoint before, [C]; NaN where not recorded.
        accs: Accuracies as fractions, [C, environments, 2]: in-split, out-split.
        is_done: Whether training ended.
    """

    folder: str
    key: JobKey
    first: dict[str, Any]
    last: dict[str, Any]
    steps: np.ndarray
    step_times: np.ndarray
    accs: np.ndarray
    is_done: bool

    @property
    def n_envs(self) -> int:
        """How many environments its records have."""
        return int(self.accs.shape[1])

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of `train`."""
        return as_dict(self.first["args"])

    @property
    def hparams(self) -> dict[str, Any]:
        """The hyperparameters as recorded."""
        return as_dict(self.first.get("hparams"))

    @property
    def teacher(self) -> dict[str, Any]:
        """What the run recorded about its teacher; empty where there is none."""
        return as_dict(self.first.get("teacher"))

    @property
    def machine(self) -> dict[str, Any]:
        """Versions and hardware; empty where not recorded."""
        return as_dict(self.first.get("machine"))

    @property
    def seconds(self) -> float | None:
        """Training wall seconds: as recorded, else the mean step times by the steps they stand for."""
        recorded = self.last.get("seconds")
        if is_number(recorded):
            return float(recorded)
        seconds = float(self.step_times @ np.diff(self.steps, prepend=-1))
        return seconds if math.isfinite(seconds) else None


@dataclass(frozen=True)
class Job:
    """A planned run: its stage, its folder and the teachers' folders that it needs, relative to the sweep."""

    stage: str
    folder: str
    needs: tuple[str, ...]
    key: JobKey
    args: dict[str, Any]

    @property
    def is_teacher(self) -> bool:
        """Whether it trains a teacher."""
        return self.stage != "student"


class Missing(NamedTuple):
    """A planned job that is not done, and why."""

    job: Job
    reason: str


@dataclass(frozen=True)
class Plan:
    """What the sweep set out to do; `jobs` by folder."""

    args: dict[str, Any]
    environments: dict[str, list[str]]
    jobs: dict[str, Job]


@dataclass(frozen=True)
class Sweep:
    """Everything that is known about a sweep.

    Attributes:
        root: Its folder.
        plan: None where there is no plan.json.
        environments: Names of the domains of each data set.
        runs: The students that count (see the module), sorted by key.
        teachers: The teachers in the sweep's own store, by id.
        missing: Planned jobs that are not done.
        notes: What was left out or taken as it is.
    """

    root: Path
    plan: Plan | None
    environments: dict[str, list[str]]
    runs: list[Run]
    teachers: dict[str, Run]
    missing: list[Missing]
    notes: list[Note]


def as_dict(value: object) -> dict[str, Any]:
    """Return a dict as it is and anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e308 < value < 1e308


def is_printable(value: object) -> TypeGuard[str]:
    """Whether a JSON value is a name that can be shown in a table: no control character, no lone surrogate."""
    return isinstance(value, str) and value != "" and value.isprintable()


def read_sweep(root: Path) -> Sweep:
    """Read a sweep folder, or the folder of a single run.

    Raises:
        UsageError: There is no such folder, or neither a plan nor a readable run in it.
    """
    if not root.is_dir():
        raise UsageError(f"--input_dir {root} is not a folder: give the --output_dir of a sweep or of a run.")
    notes: list[Note] = []
    if (root / RESULTS).is_file():
        plan, folders, store = None, ["."], root.resolve().parent
    else:
        plan, store = _read_plan(root, notes), root
        folders = [name for name in _list_folders(root) if name != TEACHERS]
    stored = [f"{TEACHERS}/{name}" for name in _list_folders(store / TEACHERS)]
    outside: list[str] = []
    if plan:
        places = {PurePosixPath(folder).parts[0] for folder in plan.jobs}
        notes += [Note(folder, "not in plan.json; left out") for folder in folders if folder not in places | {LOGS}]
        folders = [folder for folder in folders if folder in plan.jobs]
        planned = [job.folder for job in plan.jobs.values() if job.is_teacher and job.folder not in stored]
        outside = [folder for folder in planned if os.path.isabs(folder)]
        stored += [folder for folder in planned if folder not in outside and (root / folder).is_dir()]
    students = _read_runs(root, folders, notes, plan)
    teachers = _read_runs(store, stored, notes, plan)

    environments = _name_environments(plan, [*students, *teachers])
    students, teachers = (_drop_misfits(runs, environments, notes) for runs in (students, teachers))
    # Teachers in a store outside the sweep show whether jobs are done, nothing else: the tables are the sweep's own.
    missing = _list_missing(root, plan, [*students, *teachers, *_read_runs(root, outside, [], plan)]) if plan else []
    students = [run for run in students if run.is_done] if plan else _drop_doubles(students, notes)
    unfinished = [run.folder for run in students if not run.is_done]
    if unfinished:
        more = f" (and {len(unfinished) - 1} more)" if len(unfinished) > 1 else ""
        notes.append(Note(unfinished[0] + more, "not done; without a plan.json it counts as far as it got"))
    if not plan and not students:
        why = "".join(f"; {note.path}: {note.why}" for note in notes[:3])
        raise UsageError(f"--input_dir {root} holds no run that can be read{why}.")
    students.sort(key=lambda run: run.key)
    by_id = {PurePosixPath(run.folder).name: run for run in teachers}
    return Sweep(root, plan, environments, students, by_id, missing, notes)


def _list_folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _read_runs(root: Path, folders: Iterable[str], notes: list[Note], plan: Plan | None) -> list[Run]:
    runs = []
    for folder in folders:
        job = plan.jobs.get(folder) if plan else None
        run_notes: list[Note] = []
        run = _read_run(root, folder, run_notes)
        if run and job and run.key != job.key:
            why = f"holds {describe(run.key)}, but plan.json has {describe(job.key)} there; left out"
            run_notes.append(Note(folder, why))
            run = None
        if run:
            runs.append(run)
        elif not run_notes and not job:
            run_notes.append(Note(folder, f"not a run: no {RESULTS}; left out"))
        notes += run_notes
    return runs


def describe(key: JobKey) -> str:
    """Say in words which job a key stands for."""
    envs = ", ".join(map(str, key.test_envs))
    return (
        f"{key.algorithm} on {key.dataset}, test_envs [{envs}], trial_seed {key.trial_seed}, "
        f"hparams_seed {key.hparams_seed}"
    )


Lines = list[tuple[int, dict[str, Any]]]  # line number, record


def _read_run(root: Path, folder: str, notes: list[Note]) -> Run | None:
    """Read a run; None where there is no record in it."""
    try:
        names = os.listdir(root / folder)
        data = (root / folder / RESULTS).read_bytes() if RESULTS in names else b""
    except OSError as error:
        notes.append(Note(folder, f"cannot be read ({error.strerror}); left out"))
        return None
    problems: dict[str, list[int]] = {}
    lines = _check_args(_parse_lines(data, problems), problems)
    n_envs, lines = _check_accs(lines, problems)
    for why, numbers in problems.items():
        more = f" (and {len(numbers) - 1} more lines)" if len(numbers) > 1 else ""
        notes.append(Note(f"{PurePosixPath(folder, RESULTS)}:{numbers[0]}{more}", f"{why}; left out"))
    by_step = {record["step"]: record for _, record in lines}  # of two with one step the later counts
    if not by_step:
        return None
    records = [by_step[step] for step in sorted(by_step)]
    if BESIDE in names:  # a run of DomainBed's own loop, whose records cannot hold it
        records[0] = _read_beside(root / folder / BESIDE) | records[0]
    times = [record.get("step_time") for record in records]
    return Run(
        folder=folder,
        key=JobKey.of(records[0]["args"]),
        first=records[0],
        last=records[-1],
        steps=np.array(sorted(by_step)),
        step_times=np.array([time if is_number(time) else math.nan for time in times]),
        accs=np.array(list(map(itemgetter(*_name_accs(n_envs)), records)), float).reshape(len(records), n_envs, 2),
        is_done="done" in names,
    )


def _read_beside(path: Path) -> dict[str, Any]:
    """Return what our first records say and upstream's do not: the environments' names and the teacher."""
    try:
        beside = as_dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: beside[name] for name in ("environments", "teacher") if name in beside}


def _parse_lines(data: bytes, problems: dict[str, list[int]]) -> Lines:
    parsed: Lines = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = _parse_json(line)
        except ValueError:
            if number < len(lines):  # the last line has no line break yet: the run is writing it, or died in it
                problems.setdefault("not JSON", []).append(number)
        else:
            if isinstance(record, dict):
                parsed.append((number, record))
            else:
                problems.setdefault("not a JSON object", []).append(number)
    return parsed


def _parse_json(text: bytes) -> Any:
    error: Exception = ValueError("nothing to parse with")
    for loads in LOADERS:
        try:
            return loads(text)
        except (ValueError, RecursionError) as why:
            error = why
    raise ValueError("not JSON") from error


def _check_args(lines: Lines, problems: dict[str, list[int]]) -> Lines:
    """Keep the records of the run that the first sound line belongs to."""
    kept: Lines = []
    args, key = None, None
    for number, record in lines:
        try:
            step = record.get("step")
            if type(step) is not int or not 0 <= step < 2**53:
                raise ValueError("no step")
            if key is None or record.get("args") != args:
                own = JobKey.of(record.get("args"))
                if key not in (None, own):
                    raise ValueError("a record of another run")
                key, args = own, record["args"]
            kept.append((number, record))
        except ValueError as error:
            problems.setdefault(str(error), []).append(number)
    return kept


def _check_accs(lines: Lines, problems: dict[str, list[int]]) -> tuple[int, Lines]:
    """Count the environments in the first record; keep the records that have a sound accuracy for just these."""
    if not lines:
        return 0, []
    first = lines[0][1]
    n_envs = next(e for e in itertools.count() if not {f"env{e}_in_acc", f"env{e}_out_acc"} <= first.keys())
    test_envs = JobKey.of(first["args"]).test_envs
    if max(test_envs, default=0) >= n_envs:
        problems[f"test_envs {list(test_envs)}, but accuracies of {n_envs} environments"] = [n for n, _ in lines]
        return 0, []
    names, beyond = _name_accs(n_envs), f"env{n_envs}_in_acc"
    records = [record for _, record in lines]
    if not any(map(contains, records, itertools.repeat(beyond))):
        with contextlib.suppress(KeyError, ValueError):
            accs = np.array(list(map(itemgetter(*names), records)))
            if accs.dtype.kind in "fi" and ((accs >= 0) & (accs <= 1)).all():
                return n_envs, lines
    kept: Lines = []
    for number, record in lines:
        if beyond in record or not record.keys() >= {*names}:
            problems.setdefault("another number of environments than the first line", []).append(number)
        elif not all(is_number(record[name]) and 0 <= record[name] <= 1 for name in names):
            problems.setdefault("an accuracy that is not a fraction", []).append(number)
        else:
            kept.append((number, record))
    return n_envs, kept


def _name_accs(n_envs: int) -> list[str]:
    return [f"env{e}_{split}_acc" for e in range(n_envs) for split in ("in", "out")]


def _read_plan(root: Path, notes: list[Note]) -> Plan | None:
    path = root / PLAN
    if not path.exists():
        return None
    try:
        plan = json.loads(path.read_bytes())
        entries = [as_dict(entry) for entry in plan["jobs"]]
        jobs = [
            Job(
                stage=str(entry["stage"]),
                folder=PurePosixPath(entry["folder"]).as_posix(),
                needs=tuple(PurePosixPath(need).as_posix() for need in entry.get("needs") or ()),
                key=JobKey.of(entry["args"]),
                args=entry["args"],
            )
            for entry in entries
        ]
        environments = {
            dataset: names for dataset, names in as_dict(plan.get("environments")).items() if _are_names(names)
        }
        return Plan(as_dict(plan.get("args")), environments, {job.folder: job for job in jobs})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        notes.append(Note(PLAN, f"cannot be used ({type(error).__name__}: {error}); read as a folder without a plan"))
        return None


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(map(is_printable, value))


def _name_environments(plan: Plan | None, runs: list[Run]) -> dict[str, list[str]]:
    """Name each data set's domains: from the plan, else from a run's first record, else by number."""
    environments = dict(plan.environments) if plan else {}
    for dataset in {run.key.dataset for run in runs} - environments.keys():
        same = [run for run in runs if run.key.dataset == dataset]
        (n_envs, _), *_ = Counter(run.n_envs for run in same).most_common(1)
        names = (as_list(run.first.get("environments")) for run in same)
        numbered = [f"env{e}" for e in range(n_envs)]
        environments[dataset] = next((n for n in names if len(n) == n_envs and _are_names(n)), numbered)
    for job in plan.jobs.values() if plan else ():
        n_envs = max(job.key.test_envs, default=0) + 1
        environments.setdefault(job.key.dataset, [f"env{e}" for e in range(n_envs)])
    return environments


def as_list(value: object) -> list[Any]:
    """Return a list as it is and anything else as an empty one."""
    return value if isinstance(value, list) else []


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
    """Of runs with one key keep one, done before not done, then by name: two backbones never merge into one row."""
    kept: dict[JobKey, Run] = {}
    for run in sorted(runs, key=lambda run: (not run.is_done, run.folder)):
        other = kept.setdefault(run.key, run)
        if other is not run:
            notes.append(Note(run.folder, f"the same job as {other.folder} ({describe(run.key)}); left out"))
    return list(kept.values())


def _list_missing(root: Path, plan: Plan, runs: list[Run]) -> list[Missing]:
    """List the planned jobs that are not done, teachers first.

    A teacher without a folder is not missing where all jobs that need it are done: it was removed after use, or lies in
    a store that did not come along with the sweep.
    """
    by_folder = {run.folder: run for run in runs}
    done = {run.folder for run in runs if run.is_done}
    served: dict[str, set[str]] = {}
    for job in plan.jobs.values():
        for need in job.needs:
            served.setdefault(need, set()).add(job.folder)
    for job in sorted(plan.jobs.values(), key=lambda job: job.stage):  # AFT teachers before the ERM teachers they need
        if job.is_teacher and served.get(job.folder, {""}) <= done and not (root / job.folder).exists():
            done.add(job.folder)
    algorithms = order_algorithms(plan, (job.key.algorithm for job in plan.jobs.values()))
    stages = {"erm_teacher": 0, "aft_teacher": 1}

    def rank(missing: Missing) -> tuple[Any, ...]:
        job = missing.job
        stage = (job.key.dataset, stages.get(job.stage, 2), algorithms.index(job.key.algorithm))
        return (*stage, job.key.test_envs, job.key.trial_seed, job.key.hparams_seed, job.folder)

    open_jobs = [job for job in plan.jobs.values() if job.folder not in done]
    return sorted((Missing(job, _say_why(root, job, by_folder.get(job.folder))) for job in open_jobs), key=rank)


def _say_why(root: Path, job: Job, run: Run | None) -> str:
    try:
        names = set(os.listdir(root / job.folder))
    except OSError:
        names = set()
    if "done" in names and not run:
        return f"done, but its {RESULTS} cannot be used"
    if "failed" in names:
        return f"failed: {_read_failure(root, job)}"
    if run:
        steps = job.args.get("steps")
        return f"incomplete at step {run.steps[-1]}" + (f" of {steps}" if steps else "")
    if names & {RESULTS, "resume.pt"}:
        return "incomplete, before its first record"
    waits = [need for need in job.needs if not (root / need / "done").exists()]
    return f"waiting for teacher {PurePosixPath(waits[0]).name}" if waits else "not launched"


def _read_failure(root: Path, job: Job) -> str:
    try:
        lines = (root / job.folder / "failed").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    line = "".join(c for c in (lines or [""])[0] if c.isprintable()).strip()
    return cut_sweep_path(line, root, job) or "no reason given"


def cut_sweep_path(text: str, root: Path, of: Job | Run) -> str:
    """Make the paths in a text relative to the sweep: both to where it is now and to where the run was made."""
    roots = {str(root.resolve()), os.path.abspath(root)}
    made_in = of.args.get("output_dir")
    if isinstance(made_in, str) and made_in.endswith(f"/{of.folder}"):
        roots.add(made_in.removesuffix(f"/{of.folder}"))
    if os.path.isabs(of.folder):
        roots.add(os.path.dirname(of.folder))
    for path in sorted(roots - {"", "/", "."}, key=len, reverse=True):
        text = re.sub(rf"(?<![\w./-]){re.escape(path)}/", "", text)
        if "/" in path:  # else it may be any word
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w./-])", ".", text)
    return text


def order_algorithms(plan: Plan | None, algorithms: Iterable[str]) -> list[str]:
    """Order algorithms as the sweep was asked for them; without a plan, ours first, then by alphabet."""
    asked = as_list(plan.args.get("algorithms")) if plan else ["ERM", "SMA", "AFT", "KD", "DAFT"]
    return sorted(set(algorithms), key=lambda name: (asked.index(name) if name in asked else len(asked), name))
