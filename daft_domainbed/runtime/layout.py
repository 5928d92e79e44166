"""What the files in the folder of a run and of a sweep are called, and small readers of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

# Of a run.
RECORDS_FILE = "results.jsonl"
CHECKPOINT_FILE = "model.pkl"
BEST_CHECKPOINT_FILE = "model_best.pkl"
AVERAGED_CHECKPOINT_FILE = "model_averaged.pkl"
RESUME_FILE = "resume.pt"
DONE_FILE = "done"
FAILED_FILE = "failed"
PROVENANCE_FILE = "provenance.json"  # of a run of upstream's own loop, whose checkpoint and records cannot hold it

# Of an evaluation, by default in a folder of that name beside its checkpoint.
EVALUATION_FOLDER = "evaluation"
EVALUATION_FILE = "evaluation.json"
JOURNAL_FILE = "journal.jsonl"  # of what it has found so far

# Of an adaptation, by default in a folder of its own below this one, beside its checkpoint.
ADAPTATION_FOLDER = "adaptation"
ADAPTATION_FILE = "adaptation.json"

# Of a sweep.
PLAN_FILE = "plan.json"
EVALUATIONS_FILE = "evaluations.json"
TEACHERS_FOLDER = "teachers"
SLURM_FOLDER = "slurm"  # what was submitted to Slurm, and what it wrote
QUEUE_FILE = f"{SLURM_FOLDER}/jobs.json"


def read_first_record(folder: Path) -> dict[str, Any]:
    """Return the first record of a run, which is empty where there is none that can be read."""
    try:
        with (folder / RECORDS_FILE).open("rb") as file:
            return _parse_record(file.readline())
    except OSError:
        return {}


def read_last_record(folder: Path) -> dict[str, Any]:
    """Return the last whole record of a run without reading those before it; it is empty where there is none."""
    try:
        with (folder / RECORDS_FILE).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**17))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    records = map(_parse_record, reversed(lines))
    return next((record for record in records if isinstance(record.get("step"), int)), {})


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run that can be read; there are none where a checkpoint was moved without them."""
    try:
        lines = (folder / RECORDS_FILE).read_bytes().split(b"\n")
    except OSError:
        return []
    return [record for record in map(_parse_record, lines) if record]


def _parse_record(line: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict):
            return record
    return {}


def list_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by name, without its step.

    Example:
        >>> list_numbers({"step": 3, "loss": 0.5, "env0_in_acc": 1, "args": {}, "is_new": True})
        {'loss': 0.5, 'env0_in_acc': 1}
    """
    return {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def list_teachers(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the first record of a run says about its teachers, by the prefix of their slots.

    A slot called "teacher" is written as `teacher`, every other one into `teachers`. What is written about a teacher
    has the same form, so that this lists its own teachers too.

    Example:
        >>> record = {"teacher": {"algorithm": "AFT", "teacher": {"algorithm": "ERM"}}}
        >>> list_teachers(record)["teacher"]["algorithm"]
        'AFT'
        >>> list_teachers({"teachers": {"robust_teacher": {"algorithm": "AT"}}})
        {'robust_teacher': {'algorithm': 'AT'}}
    """
    others = record.get("teachers")
    slots = {"teacher": record.get("teacher")} | (others if isinstance(others, dict) else {})
    return {prefix: facts for prefix, facts in slots.items() if isinstance(facts, dict) and facts}


def pack_teachers(teachers: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a first record says about teachers that are given by the prefix of their slots.

    Example:
        >>> list_teachers(pack_teachers({"clean_teacher": {"algorithm": "ERM"}}))
        {'clean_teacher': {'algorithm': 'ERM'}}
    """
    others = {prefix: facts for prefix, facts in teachers.items() if prefix != "teacher"}
    named = {"teacher": teachers["teacher"]} if "teacher" in teachers else {}
    return named | ({"teachers": others} if others else {})


def name_teacher_file(facts: Mapping[str, Any]) -> str:
    """Return the path of a teacher's checkpoint, relative to its student's folder; older records have its folder's.

    Example:
        >>> name_teacher_file({"path": "../a/model_best.pkl", "file": "model_best.pkl"})
        '../a/model_best.pkl'
        >>> name_teacher_file({"path": "../a"})
        '../a/model.pkl'
    """
    path, name = PurePosixPath(str(facts["path"])), str(facts.get("file", CHECKPOINT_FILE))
    return str(path if path.name == name else path / name)


def read_failure(folder: Path) -> str:
    """Return why a run failed, in one line, or nothing where it did not."""
    with suppress(OSError):
        lines = (folder / FAILED_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[0] if lines else "no reason given"  # a full disk leaves an empty file
    return ""
