"""What a run recorded: its results.jsonl, read tolerantly and fast.

Nothing here raises because of what a file holds. What cannot be used is left out and said in a note; only the truncated
last line of a run that is still writing goes without a word.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import contains, itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from daft_domainbed.results.asked import LEAVE_OUT
from daft_domainbed.results.labels import identify_dataset
from daft_domainbed.results.settings import Setting
from daft_domainbed.results.values import as_dict, is_name, is_number, show_name
from daft_domainbed.runtime.layout import DONE_FILE, PROVENANCE_FILE, RECORDS_FILE, list_teachers
from daft_domainbed.runtime.origins import is_file, name_unknown

LOADERS: tuple[Callable[[bytes], Any], ...] = (json.loads,)
with contextlib.suppress(ImportError):
    from orjson import loads

    LOADERS = (loads, json.loads)  # orjson is faster, and refuses the NaN that DomainBed's writer leaves in a line

Lines = list[tuple[int, dict[str, Any]]]  # line number, record
AVERAGED = "averaged_"  # begins the names of the averaged weights' accuracies
Problems = dict[str, list[int]]  # what is wrong, and the numbers of the lines


class RunKey(NamedTuple):
    """What tells a run from the others of its sweep.

    Attributes:
        dataset: By `labels.identify_dataset`, once a whole sweep is known by its label.
    """

    dataset: str
    algorithm: str
    test_envs: tuple[int, ...]
    trial_seed: int
    hparams_seed: int

    @classmethod
    def of(cls, args: object) -> RunKey:
        """Return the key that is in a run's arguments.

        Raises:
            ValueError: What is wrong with them.
        """
        args = as_dict(args)
        for name in ("dataset", "algorithm"):
            if not is_name(args.get(name)):
                raise ValueError(f"args without {name}")
        for name in ("trial_seed", "hparams_seed"):
            if type(args.get(name)) is not int:
                raise ValueError(f"args without {name}")
        envs = args.get("test_envs")
        if not isinstance(envs, list) or any(type(e) is not int or e < 0 for e in envs) or len(set(envs)) < len(envs):
            raise ValueError("args without a list of test_envs")
        dataset, algorithm = identify_dataset(args), show_name(args["algorithm"])
        return cls(dataset, algorithm, tuple(sorted(envs)), args["trial_seed"], args["hparams_seed"])

    def relabel(self, labels: Mapping[str, str]) -> RunKey:
        """Return the same key with the data set called as in tables."""
        return self._replace(dataset=labels[self.dataset])

    def describe(self) -> str:
        """Return the key in words."""
        envs = ", ".join(map(str, self.test_envs))
        return (
            f"{self.algorithm} on {self.dataset}, test_envs [{envs}], trial_seed {self.trial_seed}, "
            f"hparams_seed {self.hparams_seed}"
        )


class Note(NamedTuple):
    """Something that was left out or taken as it is: where (relative to the sweep), and why."""

    path: str
    why: str


@dataclass(frozen=True, eq=False)
class Run:
    """The checkpoints of one run, in the order of their steps.

    Attributes:
        folder: Its path relative to the sweep; "." for a single run.
        key: Data set, algorithm, held-out domains and seeds.
        first: The first record as it was written (with "machine", "teacher" ... where this package's engine wrote it).
        last: The last record.
        steps: Step of each checkpoint, [C].
        step_times: Mean seconds a step since the checkpoint before, [C]; NaN where not recorded.
        accs: Accuracies as fractions, [C, environments, 2]: in-split, out-split.
        is_done: Whether training ended.
        root: Of the sweep that it is of; `folder` is relative to it, or below its name where there are several.
        kind: "leave-out" or "single-source", as it was asked for.
        setting: What it was given beside the draw, and its networks.
    """

    folder: str
    key: RunKey
    first: dict[str, Any]
    last: dict[str, Any]
    steps: np.ndarray
    step_times: np.ndarray
    accs: np.ndarray
    is_done: bool
    root: Path = Path()
    kind: str = LEAVE_OUT
    setting: Setting = ()

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.root / self.folder.removeprefix(f"{self.root}/")

    @property
    def n_envs(self) -> int:
        """Number of environments that its records have."""
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
    def teachers(self) -> dict[str, dict[str, Any]]:
        """What the run recorded about its teachers, by the prefix of their slots; empty where there are none."""
        return list_teachers(self.first)

    @property
    def machine(self) -> dict[str, Any]:
        """Versions and hardware; empty where not recorded."""
        return as_dict(self.first.get("machine"))

    @property
    def origins(self) -> list[str]:
        """What its networks start from, those of its teachers too, where they do not start from nothing."""
        return read_origins(self.first)

    @property
    def seconds(self) -> float | None:
        """Training wall seconds: as recorded, else the mean step times by the steps they stand for."""
        recorded = self.last.get("seconds")
        if is_number(recorded):
            return float(recorded)
        seconds = float(self.step_times @ np.diff(self.steps, prepend=-1))
        return seconds if math.isfinite(seconds) else None


def read_origins(recorded: Mapping[str, Any]) -> list[str]:
    """Return what a first record, or what a student recorded of a teacher, says of where networks start."""
    if "origins" in recorded:
        return [show_name(str(text)) for text in as_dict(recorded["origins"]).values()]
    # Runs of before said nothing; what they were given says that weights came from a file.
    given = {name: value for name, value in as_dict(recorded.get("hparams")).items() if name.endswith("weights")}
    return [show_name(name_unknown(value)) for value in given.values() if is_file(value)]


def read_run(root: Path, folder: str, notes: list[Note], weights: str = "plain") -> Run | None:
    """Read a run; None where no record of it can be used.

    Args:
        root: The sweep's folder.
        folder: The run's, relative to the sweep.
        notes: A list, to which is added what was left out.
        weights: Whose accuracies count: the "plain" weights', or the "averaged" ones'.
    """
    try:
        names = os.listdir(root / folder)
        data = (root / folder / RECORDS_FILE).read_bytes() if RECORDS_FILE in names else b""
    except OSError as error:
        notes.append(Note(folder, f"cannot be read ({error.strerror}); left out"))
        return None
    problems: Problems = {}
    lines = _check_args(_parse_lines(data, problems), problems)
    if weights == "averaged":
        lines = _take_averaged(lines, problems)
    n_envs, lines = _check_accs(lines, problems)
    for why, numbers in problems.items():
        more = f" (and {len(numbers) - 1} more lines)" if len(numbers) > 1 else ""
        notes.append(Note(f"{PurePosixPath(folder, RECORDS_FILE)}:{numbers[0]}{more}", f"{why}; left out"))
    by_step = {record["step"]: record for _, record in lines}  # of two with one step the later counts
    if not by_step:
        return None
    records = [by_step[step] for step in sorted(by_step)]
    if PROVENANCE_FILE in names:  # a run of DomainBed's own loop, whose records cannot hold it
        records[0] = _read_beside(root / folder / PROVENANCE_FILE) | records[0]
    times = [record.get("step_time") for record in records]
    return Run(
        folder=folder,
        key=RunKey.of(records[0]["args"]),
        first=records[0],
        last=records[-1],
        steps=np.array(sorted(by_step)),
        step_times=np.array([time if is_number(time) else math.nan for time in times]),
        accs=np.array(list(map(itemgetter(*_name_accs(n_envs)), records)), float).reshape(len(records), n_envs, 2),
        is_done=DONE_FILE in names,
        root=root,
    )


def _read_beside(path: Path) -> dict[str, Any]:
    """Return what upstream's own first records do not say: the environments' names, the teachers, the origins."""
    try:
        beside = as_dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: beside[name] for name in ("environments", "teacher", "teachers", "origins") if name in beside}


def _parse_lines(data: bytes, problems: Problems) -> Lines:
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


def _check_args(lines: Lines, problems: Problems) -> Lines:
    """Keep the records of the run that the first sound line belongs to."""
    kept: Lines = []
    args, key = None, None
    for number, record in lines:
        try:
            step = record.get("step")
            if type(step) is not int or not 0 <= step < 2**53:
                raise ValueError("no step")
            if key is None or record.get("args") != args:
                found = RunKey.of(record.get("args"))
                if key not in (None, found):
                    raise ValueError("a record of another run")
                key, args = found, record["args"]
            kept.append((number, record))
        except ValueError as error:
            problems.setdefault(str(error), []).append(number)
    return kept


def _take_averaged(lines: Lines, problems: Problems) -> Lines:
    """Put the accuracies of the averaged weights in the place of the plain ones'; records without them are dropped."""
    taken: Lines = []
    for number, record in lines:
        averaged = {name.removeprefix(AVERAGED): record[name] for name in record if name.startswith(f"{AVERAGED}env")}
        if averaged:
            taken.append((number, record | averaged))
        else:
            problems.setdefault("no averaged weights (hyperparameter average_start)", []).append(number)
    return taken


def _check_accs(lines: Lines, problems: Problems) -> tuple[int, Lines]:
    """Count the environments in the first record; keep the records that have a sound accuracy for just these."""
    if not lines:
        return 0, []
    first = lines[0][1]
    n_envs = next(e for e in itertools.count() if not {f"env{e}_in_acc", f"env{e}_out_acc"} <= first.keys())
    test_envs = RunKey.of(first["args"]).test_envs
    if max(test_envs, default=0) >= n_envs:
        problems[f"test_envs {list(test_envs)}, but accuracies of {n_envs} environments"] = [n for n, _ in lines]
        return 0, []
    if _are_all_sound(lines, n_envs):
        return n_envs, lines
    kept: Lines = []
    for number, record in lines:
        if why := _find_fault(record, n_envs):
            problems.setdefault(why, []).append(number)
        else:
            kept.append((number, record))
    return n_envs, kept


def _are_all_sound(lines: Lines, n_envs: int) -> bool:
    """Whether no record has a fault, all of them looked at at once, which is faster than one by one."""
    records = [record for _, record in lines]
    if any(map(contains, records, itertools.repeat(f"env{n_envs}_in_acc"))):
        return False
    with contextlib.suppress(KeyError, ValueError):
        accs = np.array(list(map(itemgetter(*_name_accs(n_envs)), records)))
        return accs.dtype.kind in "fi" and bool(((accs >= 0) & (accs <= 1)).all())
    return False


def _find_fault(record: dict[str, Any], n_envs: int) -> str:
    names = _name_accs(n_envs)
    if f"env{n_envs}_in_acc" in record or not record.keys() >= {*names}:
        return "another number of environments than the first line"
    if not all(is_number(record[name]) and 0 <= record[name] <= 1 for name in names):
        return "an accuracy that is not a fraction"
    return ""


def _name_accs(n_envs: int) -> list[str]:
    return [f"env{e}_{split}_acc" for e in range(n_envs) for split in ("in", "out")]
