"""Which teachers stand behind a run: its own, theirs, and so on, nearest first."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from daft_domainbed.methods import METHODS
from daft_domainbed.results.records import Run
from daft_domainbed.results.selection import IN
from daft_domainbed.results.sweeps import Sweep
from daft_domainbed.results.values import as_dict, is_name, is_number, show_name
from daft_domainbed.runtime.layout import list_teachers, name_teacher_file

MOST_TEACHERS = 8  # behind one student: a bound for records that nest without end


class TracedTeacher(NamedTuple):
    """A teacher behind a student.

    Attributes:
        algorithm: The method that made it.
        id: The name of its folder; empty where not recorded.
        slot: The prefix of the slot that it fills.
        generation: 1 for a teacher of the student, 2 for a teacher of such a teacher, and so on.
        recorded: What the student recorded about it.
        run: Its own run, where the sweep holds it.
    """

    algorithm: str
    id: str
    slot: str
    generation: int
    recorded: dict[str, Any]
    run: Run | None

    def read_acc(self, env: int) -> float | None:
        """Return the accuracy, a fraction, on an environment's in-split at its last record."""
        recorded = as_dict(self.recorded.get("accuracies")).get(f"env{env}_in_acc")
        if is_number(recorded) and 0 <= recorded <= 1:
            return float(recorded)
        return float(self.run.accs[-1, env, IN]) if self.run and env < self.run.n_envs else None

    @property
    def last_step(self) -> int | None:
        """Step of its last record."""
        steps = self.recorded.get("steps")
        if type(steps) is int:
            return steps - 1
        return int(self.run.steps[-1]) if self.run else None


def trace_teachers(sweep: Sweep, run: Run) -> list[TracedTeacher]:
    """List the teachers behind a run, nearest first, each once.

    They are read from the run's first record; where that names none, because another engine wrote it, from the plan
    and the teachers' own folders.
    """
    found: list[TracedTeacher] = []
    waiting = _list_nearest(sweep, run, run.teachers, 1)
    while waiting and len(found) < MOST_TEACHERS:
        teacher = waiting.pop(0)
        if any(teacher.id and teacher.id == other.id for other in found):
            continue
        found.append(teacher)
        recorded = list_teachers(teacher.recorded) or (teacher.run.teachers if teacher.run else {})
        waiting += _list_nearest(sweep, teacher.run, recorded, teacher.generation + 1)
    return found


def _list_nearest(
    sweep: Sweep, student: Run | None, recorded: dict[str, dict[str, Any]], generation: int
) -> list[TracedTeacher]:
    """List the teachers of a student, itself a teacher or not, from what is recorded about them, else from the plan."""
    if recorded:
        root = student.root if student else None
        return [_find_recorded(sweep, root, slot, generation, facts) for slot, facts in recorded.items()]
    planned = sweep.plan.runs.get(student.folder) if sweep.plan and student else None
    ids = [PurePosixPath(need).name for need in (planned.needs if planned else ())]
    runs = {i: run for i in ids if (run := sweep.find_teacher(i, student.root if student else None))}
    return [TracedTeacher(run.key.algorithm, i, "teacher", generation, {}, run) for i, run in runs.items()]


def _find_recorded(
    sweep: Sweep, root: Path | None, slot: str, generation: int, recorded: dict[str, Any]
) -> TracedTeacher:
    teacher_id = PurePosixPath(name_teacher_file(recorded)).parent.name if "path" in recorded else ""
    run = sweep.find_teacher(teacher_id, root)
    named = recorded.get("algorithm")
    algorithm = show_name(named) if is_name(named) else run.key.algorithm if run else "unknown"
    return TracedTeacher(algorithm, teacher_id, slot, generation, recorded, run)


def rank_student(student: Run, teacher: TracedTeacher) -> tuple[bool, int]:
    """Return how far a student is from a teacher behind it: of several, the one with the lowest rank speaks for it.

    Students that start from a teacher's weights, and so are teachers themselves, come after those that only learn.
    """
    method = METHODS.get(student.key.algorithm)
    return method is not None and any(slot.starts for slot in method.slots), teacher.generation
