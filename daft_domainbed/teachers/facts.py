"""What an Algorithm is never told of its run, and without which no teacher can be found, checked or handed over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.host.contract import DatasetFacts, Host
from daft_domainbed.methods import list_slots
from daft_domainbed.runtime.origins import list_origins
from daft_domainbed.teachers.provenance import Split, describe
from daft_domainbed.teachers.teacher import Teacher


@dataclass(frozen=True)
class RunFacts:
    """Everything about a run that its teachers have to agree with, or need to be made.

    Attributes:
        args: The run's arguments, with the number of steps.
        user_hparams: What the user gave in `--hparams`, unresolved.
        hparams: The run's hyperparameters.
        dataset: What is known of the data set.
        num_classes: Number of classes.
        input_shape: (C, H, W).
        splits: In- and out-split of every environment, in order.
        host: The host whose parts the run uses.
        output_dir: The run's folder; teacher paths are recorded relative to it.
        teachers_dir: The store of teachers.
        teachers: Those that were found, by slot.
        device: On which the run computes.
    """

    args: TrainArgs
    user_hparams: Mapping[str, Any]
    hparams: Mapping[str, Any]
    dataset: DatasetFacts
    num_classes: int
    input_shape: tuple[int, ...]
    splits: Sequence[tuple[Split, Split]] = field(repr=False)
    host: Host = field(repr=False)
    output_dir: Path
    teachers_dir: Path
    teachers: Mapping[str, Teacher] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def with_teachers(self, teachers: Mapping[str, Teacher]) -> RunFacts:
        """Return the same facts with the teachers that were found; fingerprints are not taken again."""
        facts = replace(self, teachers=teachers)
        vars(facts)["provenance"] = self.provenance
        return facts

    @cached_property
    def origins(self) -> dict[str, str]:
        """What its networks start from, those of its teachers too, as far as anybody knows."""
        slots = list_slots(self.args.algorithm, self.hparams)
        pretrained = [s.prefix for s in slots if s.kind is None and self.hparams.get(s.prefix, "auto") == "auto"]
        own = ["weights", *(f"{prefix}_weights" for prefix in pretrained)]
        origins = list_origins(self.hparams, self.input_shape, own)
        for prefix, teacher in self.teachers.items():
            origins |= {f"{prefix}: {name}": text for name, text in teacher.facts.get("origins", {}).items()}
        return origins

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """The run's provenance, of plain types, as a checkpoint stores it."""
        return describe(self.args, self.num_classes, self.input_shape, self.splits)


_current: ContextVar[RunFacts | None] = ContextVar("run_in_progress", default=None)


@contextmanager
def run_in_progress(facts: RunFacts) -> Iterator[None]:
    """Make the facts known to the algorithms that are built inside; runs may nest (a teacher's inside a student's)."""
    token = _current.set(facts)
    try:
        yield
    finally:
        _current.reset(token)


def set_run_facts(facts: RunFacts) -> None:
    """Make the facts known for the rest of the process, which is one run of upstream's own loop."""
    _current.set(facts)


def get_run_facts() -> RunFacts | None:
    """Return the facts of the innermost run in progress, or None."""
    return _current.get()


def require_run_facts(what: str) -> RunFacts:
    """Return the facts of the run in progress.

    Args:
        what: Needs them, for the message.

    Raises:
        UsageError: There is none.
    """
    facts = get_run_facts()
    if facts is None:
        raise UsageError(
            f"{what!r} cannot be checked: nothing says which data set and held-out domains this run has; "
            f"start it with 'daft-domainbed train' or 'daft-domainbed host domainbed.scripts.train'"
        )
    return facts


def take_teacher(prefix: str = "teacher") -> Teacher:
    """Return the model of a slot, which was found or made, verified and frozen before the algorithm is built.

    Args:
        prefix: The slot's.

    Raises:
        UsageError: No run is in progress, or its method has no such slot.
    """
    facts = require_run_facts(prefix)
    if prefix not in facts.teachers:
        raise UsageError(
            f"{facts.args.algorithm} has no slot {prefix!r}.{suggest(prefix, facts.teachers)} Declare it, as in "
            f"add_algorithm(..., slots=[Slot('ERM', {prefix!r})])"
        )
    return facts.teachers[prefix]
