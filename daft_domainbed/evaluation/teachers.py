"""The teachers that a student's records name, as models of pixels again."""

from __future__ import annotations

from typing import Any

from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.pixel_model import PixelModel
from daft_domainbed.evaluation.subject import Subject, load_algorithm
from daft_domainbed.host.checkpoints import load_checkpoint
from daft_domainbed.methods import PLAIN
from daft_domainbed.models.weights import hash_state
from daft_domainbed.runtime.layout import list_teachers, name_teacher_file, read_first_record


def find_teachers(subject: Subject) -> tuple[dict[str, tuple[str, PixelModel]], list[str]]:
    """Return the teachers of a student's run.

    A teacher that was moved, or whose weights are not those that the student learnt from, is never asked: that is no
    reason to refuse the student.

    Returns:
        Algorithm and model, by slot; and for each that cannot be asked the reason.
    """
    found, reasons = {}, []
    for slot, facts in list_teachers(read_first_record(subject.path.parent)).items():
        try:
            found[slot] = _load(subject, facts)
        except UsageError as error:
            reasons.append(f"fidelity to the {slot}: {error}")
    return found, reasons


def _load(subject: Subject, facts: Any) -> tuple[str, PixelModel]:
    if not isinstance(facts, dict) or not isinstance(facts.get("path"), str):
        raise UsageError("it is a pretrained network, without logits")
    path = subject.path.parent / name_teacher_file(facts)
    if not path.is_file():
        raise UsageError(f"its weights are gone from {facts['path']}")
    content = load_checkpoint(path)
    algorithm = load_algorithm(content, path, subject.host)
    if hash_state(algorithm.state_dict()) != facts.get("sha256"):
        raise UsageError(f"{facts['path']} holds other weights than the student learnt from")
    name = str(content["args"].get("algorithm", PLAIN))
    return name, PixelModel(algorithm, subject.model.spec, subject.model.device)
