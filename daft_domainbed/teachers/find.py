"""The right teacher for each slot of a run: found where it lies, or made; verified, and frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.errors import UsageError
from daft_domainbed.host.checkpoints import load_checkpoint
from daft_domainbed.methods import Slot, find_method, list_slots
from daft_domainbed.models.weights import find_non_finite, hash_state
from daft_domainbed.runtime.layout import CHECKPOINT_FILE, DONE_FILE, read_last_record
from daft_domainbed.runtime.randomness import preserve_states
from daft_domainbed.teachers.facts import RunFacts
from daft_domainbed.teachers.plan import plan_teacher
from daft_domainbed.teachers.rebuild import build_pretrained, rebuild_model
from daft_domainbed.teachers.teacher import Teacher, describe_teacher
from daft_domainbed.teachers.verify import check_kind, verify

Make = Callable[[TrainArgs], object]  # trains a model as these arguments say


def find_teachers(facts: RunFacts, make: Make) -> dict[str, Teacher]:
    """Find the model of each slot of a run's method, make those that are missing, verify and freeze them.

    All global random states are left as they were.

    Args:
        facts: Of the run.
        make: Trains a teacher that the store lacks.

    Raises:
        UsageError: A teacher is missing, damaged, of the wrong kind, or was trained on something else; each differing
            field is named with both values.
    """
    slots = list_slots(facts.args.algorithm, facts.hparams)
    with preserve_states():
        # What the user named comes first: a mistake in it should not wait until other teachers are trained.
        found = {
            slot.prefix: _find(slot, facts, make) for slot in sorted(slots, key=lambda slot: _is_auto(slot, facts))
        }
    return {slot.prefix: found[slot.prefix] for slot in slots}


def _is_auto(slot: Slot, facts: RunFacts) -> bool:
    return bool(facts.hparams.get(slot.prefix, "auto") == "auto")


def _find(slot: Slot, facts: RunFacts, make: Make) -> Teacher:
    where = facts.hparams.get(slot.prefix, "auto")
    if where == "auto" and slot.kind is None:
        return build_pretrained(slot, facts)
    path = _get_made(slot, facts, make) if where == "auto" else Path(where).expanduser()
    if path.is_dir():
        path = _search(slot, path, facts)
    content = load_checkpoint(path)
    check_kind(facts.args.algorithm, slot, content, path)
    verify(content, path, facts, slot.prefix, is_auto=where == "auto")
    model = rebuild_model(content, path, facts.host)
    if bad := find_non_finite(model.state_dict()):
        raise UsageError(f"teacher {path}: its weights {bad} are no numbers, so its training diverged: make it again")
    described = describe_teacher(content, path, facts.output_dir)
    described["sha256"] = hash_state(model.state_dict())
    return Teacher(model, path, content["model_hparams"], facts.dataset.input_spec, facts.args.seed, described)


def _get_made(slot: Slot, facts: RunFacts, make: Make) -> Path:
    def place(args: TrainArgs) -> TrainArgs:
        job = plan_teacher(slot, facts.hparams, args, facts.user_hparams, facts.host, facts.dataset)
        return job.place(facts.teachers_dir)

    args = place(facts.args)
    if _is_made(args):
        return Path(args.output_dir) / CHECKPOINT_FILE
    before = place(replace(facts.args, data_id=None))  # as it was called before files counted in its name
    if facts.args.data_id and _is_made(before):
        path = Path(before.output_dir) / CHECKPOINT_FILE
        with suppress(UsageError):  # of other data of that name
            verify(load_checkpoint(path), path, facts)
            return path
    make(args)
    return Path(args.output_dir) / CHECKPOINT_FILE


def _is_made(args: TrainArgs) -> bool:
    return all((Path(args.output_dir) / name).is_file() for name in (DONE_FILE, CHECKPOINT_FILE))


def _search(slot: Slot, folder: Path, facts: RunFacts) -> Path:
    """Return the match with the highest mean out-split accuracy over *training* environments.

    What itself learnt from a teacher is no match, though its file may be named: KD is the control for DAFT, and a
    folder that holds both kinds of runs would else give it DAFT's own student as the teacher.
    """
    best, best_accuracy, reasons = None, -math.inf, []
    paths = sorted(path for above in ("", "*/", "*/*/") for path in folder.glob(above + CHECKPOINT_FILE))
    if not paths:
        raise UsageError(
            f"no {CHECKPOINT_FILE} in {folder} or two levels below: name a checkpoint, a folder of runs, or auto"
        )
    for path in paths:
        try:
            content = load_checkpoint(path)
            check_kind(facts.args.algorithm, slot, content, path)
            _refuse_student(slot, content, path, facts)
            verify(content, path, facts, slot.prefix)
        except UsageError as error:
            reasons.append(str(error))
            continue
        accuracy = _get_validation_accuracy(path, facts)
        if accuracy > best_accuracy or best is None:
            best, best_accuracy = path, accuracy
    if best is None:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise UsageError(f"none of the {len(paths)} checkpoints in {folder} can teach this run: {reasons[0]}{more}")
    return best


def _refuse_student(slot: Slot, content: Mapping[str, Any], path: Path, facts: RunFacts) -> None:
    kind = content["args"].get("algorithm", "ERM")
    if kind not in facts.host.algorithms.ALGORITHMS:
        raise UsageError(f"{path} is a checkpoint of {kind}, which is no algorithm of host {facts.host.name}")
    if kind != slot.kind and find_method(kind).slots:
        raise UsageError(f"{path} is a student of {kind}; name the file itself if it is to teach")


def _get_validation_accuracy(path: Path, facts: RunFacts) -> float:
    record = read_last_record(path.parent)
    held_out = set(facts.args.test_envs)  # their accuracies are never read
    keys = [f"env{i}_out_acc" for i in range(len(facts.splits)) if i not in held_out]
    values = [record[key] for key in keys if key in record]
    return sum(values) / len(values) if values else -math.inf
