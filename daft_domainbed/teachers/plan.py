"""Which job makes a teacher: what it is trained on and how, and the name that follows from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from daft_domainbed.arguments import TrainArgs, name_dataset
from daft_domainbed.host.contract import DatasetFacts, Host
from daft_domainbed.methods import PLAIN, Slot, find_method, list_slots
from daft_domainbed.plugin.defaults import get_default_hparams, get_known_hparams, resolve_auto

# By the ending of a slot's hyperparameter, what it is called in the job that trains the slot's network.
_NETWORK = {
    "_backbone": "backbone", "_weights": "weights", "_frozen": "backbone_frozen", "_input_size": "backbone_input_size",
}  # fmt: skip

_ITS_OWN = ("average_start", "probe_steps")  # what a run counts in its own steps, and teaches nobody


@dataclass(frozen=True)
class TeacherJob:
    """A teacher that an ordinary training job makes.

    Attributes:
        args: Of the job, but for the places where it lies.
        hparams: What its `--hparams` say; every one is spelt out, so that equal teachers have equal arguments.
        identity: The name of its folder, a hash of what it is trained on and how; equal teachers are one teacher.
    """

    args: TrainArgs
    hparams: dict[str, Any]
    identity: str

    def place(self, store: Path) -> TrainArgs:
        """Return the job's arguments in a store of teachers."""
        return replace(self.args, output_dir=str(store / self.identity), teachers_dir=str(store))


def list_slots_to_make(algorithm: str, hparams: Mapping[str, Any]) -> list[Slot]:
    """Return the slots of an algorithm whose model is found or made by itself, since the user names none."""
    slots = list_slots(algorithm, hparams)
    return [slot for slot in slots if slot.kind and hparams.get(slot.prefix, "auto") == "auto"]


def plan_teacher(
    slot: Slot, hparams: Mapping[str, Any], args: TrainArgs, user: Mapping[str, Any], host: Host, dataset: DatasetFacts
) -> TeacherJob:
    """Return the job that makes the model of a slot.

    It takes the host's defaults, what `<prefix>_*` describe, what the slot hands on, and the user's explicit
    hyperparameters, never a random draw of the method that it is made for.

    Args:
        slot: Of the method that is trained with `args`; its `kind` is not None.
        hparams: The hyperparameters of that method.
        args: Its arguments, with the number of steps.
        user: What the user gave in `--hparams`.
        host: Whose defaults count.
        dataset: On which both are trained.
    """
    assert slot.kind and args.steps
    named_steps = hparams.get(f"{slot.described_by or slot.prefix}_steps", "auto")
    steps = args.steps if named_steps == "auto" else named_steps
    defaults, known = get_default_hparams(host, slot.kind, dataset), get_known_hparams(host, slot.kind, dataset, user)
    given = {name: value for name, value in user.items() if name in known and name not in _ITS_OWN}
    own = _describe_network(slot, hparams) | _pass_on(slot, hparams, steps)
    full = resolve_auto(slot.kind, defaults | given | {name: own[name] for name in own if name in known})
    if slot.steps:
        own_steps = hparams.get(slot.steps, "auto")
        steps = max(1, steps // 4) if own_steps == "auto" else own_steps
    named = {name: value for name, value in full.items() if name in defaults or value != known[name]}
    job = _make_args(slot.kind, args, steps, named, host, dataset)
    teachers = {
        inner.prefix: plan_teacher(inner, full, job, named, host, dataset).identity  # as the job itself will
        for inner in list_slots_to_make(slot.kind, full)
    }
    return TeacherJob(job, named, _name(job, named, teachers))


def _describe_network(slot: Slot, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return what describes the network of a slot's model, or of the one that its model starts from."""
    if slot.prefix.startswith(slot.passes):
        return {}  # it is handed on by the same names, and describes a model further back
    start = _find_start(slot)
    described = {
        start + ending if start else name: hparams[slot.prefix + ending]
        for ending, name in _NETWORK.items()
        if slot.prefix + ending in hparams  # else the job's own defaults, and what the user gave of them
    }
    lr = hparams.get(f"{slot.prefix}_lr", "auto")
    probe_steps = hparams.get(f"{slot.prefix}_probe_steps", 0)
    return described | ({} if lr == "auto" else {"lr": lr}) | ({"probe_steps": probe_steps} if probe_steps else {})


def _pass_on(slot: Slot, hparams: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return what the method says of how its teacher is made, and of models further back."""
    if not slot.passes:
        return {}
    passed = {name: value for name, value in hparams.items() if name.startswith(slot.passes) and name != slot.steps}
    return passed | {f"{_find_start(slot) or slot.prefix}_steps": steps}


def _find_start(slot: Slot) -> str | None:
    """Return the prefix of the slot that a slot's model starts from itself."""
    return next((inner.prefix for inner in find_method(slot.kind or PLAIN).slots if inner.starts), None)


def _make_args(
    kind: str, args: TrainArgs, steps: int, hparams: Mapping[str, Any], host: Host, dataset: DatasetFacts
) -> TrainArgs:
    test_envs = sorted(args.test_envs)
    data_seed = args.seed if args.data_seed is None else args.data_seed
    return replace(
        args,
        algorithm=kind,
        hparams=json.dumps(dict(hparams), sort_keys=True),
        hparams_seed=0,
        test_envs=test_envs,
        steps=steps,
        checkpoint_freq=None,
        seed=host.misc.seed_hash(name_dataset(args.dataset), test_envs, args.trial_seed),
        # Elsewhere the data do not depend on the seed, so that runs of every seed can share a teacher.
        data_seed=data_seed if dataset.is_seeded else None,
        skip_model_save=False,
        save_model_every_checkpoint=False,
    )


def _name(job: TrainArgs, hparams: Mapping[str, Any], teachers: dict[str, str]) -> str:
    identity = {
        "algorithm": job.algorithm,
        "dataset": name_dataset(job.dataset),
        "test_envs": job.test_envs,
        "trial_seed": job.trial_seed,
        "holdout_fraction": job.holdout_fraction,
        "task": job.task,
        "uda_holdout_fraction": job.uda_holdout_fraction,
        "seed": job.seed,
        "data_seed": job.data_seed,
        "steps": job.steps,
        "precision": job.precision,
        "hparams": hparams,
        "teacher": teachers.get("teacher"),
    }
    # What was not known from the beginning counts only where it is given, so that older teachers keep their names.
    others = {prefix: name for prefix, name in teachers.items() if prefix != "teacher"}
    later = {
        "teachers": others,
        "data_id": job.data_id,
        "leave_out_classes": job.leave_out_classes,
        "cap_batch_size": job.cap_batch_size,
    }
    text = json.dumps(identity | {name: value for name, value in later.items() if value}, sort_keys=True)
    return f"{job.algorithm}-{sha256(text.encode()).hexdigest()[:16]}"
