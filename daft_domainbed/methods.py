"""The table of methods: where each is written, and which models it learns from. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Slot:
    """A frozen model that a method learns from, or starts from.

    Attributes:
        kind: The method that makes it; None is any pretrained network, which nobody has to train.
        prefix: Names the slot, and begins the names of the hyperparameters that describe it.
        passes: Prefixes of the hyperparameters that are handed on to the job that makes it.
        steps: The hyperparameter that says how many updates that job takes; by default `<prefix>_steps`. Where it is
            another one, its "auto" is a quarter of those.
        starts: Whether the method starts from its weights, and so has its architecture.
        asked_by: The hyperparameter that asks for it; where that is not true, there is no such slot.
        described_by: The slot whose hyperparameters describe it, where they are not its own.
    """

    kind: str | None
    prefix: str = "teacher"
    passes: tuple[str, ...] = ()
    steps: str = ""
    starts: bool = False
    asked_by: str = ""
    described_by: str = ""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        file: Its module in `daft_domainbed.algorithms`, where its class has its name; nothing where the host has it.
        slots: The models that it learns from.
        is_plain: Whether its weights are those of plain ERM, so that they load into the host's ERM.
        distilled_by: The method whose students learn from its models; a student of plain teachers refuses them.
        mixin: The class, where the user added it.
        hparams: Its hyperparameters, where the user added it.
        takes_texts: Whether it trains on texts; what has no file here is not asked.
    """

    file: str = ""
    slots: tuple[Slot, ...] = ()
    is_plain: bool = True
    distilled_by: str = ""
    mixin: type | None = None
    hparams: Mapping[str, Any] | None = None
    takes_texts: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it is a mixin over the host's ERM, and none of the host's own algorithms."""
        return bool(self.file) or self.mixin is not None

    @property
    def has_own_architecture(self) -> bool:
        """Whether its backbone is chosen for it, not given by a model that it starts from."""
        return not any(slot.starts for slot in self.slots)


METHODS: dict[str, Method] = {
    "ERM": Method(takes_texts=True),
    "SMA": Method("sma", is_plain=False, takes_texts=True),
    "AFT": Method("aft", (Slot("ERM", starts=True),), distilled_by="DAFT"),
    "KD": Method(
        "daft",
        (
            Slot("ERM"),
            # The teacher that DAFT would have, which tells how confident KD's own is to be.
            Slot(
                "AFT",
                "aft_teacher",
                passes=("aft_", "teacher"),
                steps="aft_steps",
                asked_by="kd_match",
                described_by="teacher",
            ),
        ),
        takes_texts=True,
    ),
    "DAFT": Method("daft", (Slot("AFT", passes=("aft_", "teacher"), steps="aft_steps"),)),
    "AT": Method("at"),
    "TinTeM": Method("tintem", (Slot(None),)),
    "BMTARD": Method("bmtard", (Slot("ERM", "clean_teacher"), Slot("AT", "robust_teacher", passes=("at_",)))),
    "CLIP": Method("clip"),
    "CaRot": Method("carot", (Slot("CLIP", starts=True),)),
    "FAAL": Method("faal", (Slot("AT", passes=("at_",), starts=True),)),
    "OAT": Method("oat", is_plain=False),
    "RATIO": Method("ratio"),
    "ADT": Method("adt"),
    "PIAT": Method("piat", (Slot("ERM", "natural", asked_by="piat_static"),), takes_texts=True),
}

PLAIN = "ERM"  # the host's own, which ours are mixins over
COMPARED = ("ERM", "KD", "DAFT")  # what `run` and `sweep` train unless they are told

STUDENT, EVALUATION, ADAPTATION = "student", "evaluation", "adaptation"  # stages that make no teacher
QUESTIONS = (EVALUATION, ADAPTATION)  # those that train nothing


def find_method(algorithm: str) -> Method:
    """Return an algorithm's row; the host's own algorithms have none but ERM, and weights that are their own."""
    return METHODS.get(algorithm, Method(is_plain=False))


def load_class(algorithm: str) -> Any:
    """Return the class of one of our methods, or of the user's own; the one place where a name becomes a class."""
    method = METHODS[algorithm]
    return method.mixin or getattr(import_module(f"daft_domainbed.algorithms.{method.file}"), algorithm)


def list_ours() -> Iterator[str]:
    """Yield the names of all methods that are added to a host."""
    return (name for name, method in METHODS.items() if method.is_ours)


def list_slots(algorithm: str, hparams: Mapping[str, Any] | None = None) -> list[Slot]:
    """Return the slots of an algorithm, those that a hyperparameter asks for only where it does.

    Args:
        algorithm: Any.
        hparams: Of a run, or what the user gave of them.
    """
    return [slot for slot in find_method(algorithm).slots if not slot.asked_by or (hparams or {}).get(slot.asked_by)]


def ask_for_slots(algorithm: str) -> dict[str, bool]:
    """Return the hyperparameters that an algorithm's further slots are asked for by, each set.

    Example:
        >>> ask_for_slots("PIAT"), ask_for_slots("DAFT")
        ({'piat_static': True}, {})
    """
    return {slot.asked_by: True for slot in find_method(algorithm).slots if slot.asked_by}


def list_stages(algorithm: str, hparams: Mapping[str, Any] | None = None) -> list[str]:
    """Return an algorithm and those that make its teachers.

    Example:
        >>> list_stages("DAFT")
        ['DAFT', 'AFT', 'ERM']
        >>> list_stages("KD"), list_stages("KD", {"kd_match": True})
        (['KD', 'ERM'], ['KD', 'ERM', 'AFT'])
    """
    kinds = [slot.kind for slot in list_slots(algorithm, hparams) if slot.kind]
    return list(dict.fromkeys([algorithm, *(stage for kind in kinds for stage in list_stages(kind))]))


def find_distiller(kind: str) -> str:
    """Return the method whose students learn from models of a kind.

    Example:
        >>> find_distiller("AFT"), find_distiller("ERM")
        ('DAFT', 'KD')
    """
    plain = next(name for name in METHODS if list_slots(name) == [Slot(PLAIN)])
    return find_method(kind).distilled_by or plain


def name_stage(algorithm: str) -> str:
    """Return the stage of a job that makes a teacher, as plans store it.

    Example:
        >>> name_stage("AFT")
        'aft_teacher'
    """
    return f"{algorithm.lower()}_teacher"
