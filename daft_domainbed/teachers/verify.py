"""Is a checkpoint the teacher that a run asks for, and did it see nothing that it should not?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from daft_domainbed.arguments import is_same_data, name_dataset
from daft_domainbed.data.splits import build_data
from daft_domainbed.errors import UsageError
from daft_domainbed.methods import PLAIN, Slot, find_distiller, find_method
from daft_domainbed.runtime.layout import PROVENANCE_FILE
from daft_domainbed.runtime.randomness import preserve_states, seed_everything
from daft_domainbed.teachers import provenance
from daft_domainbed.teachers.facts import RunFacts


def check_kind(algorithm: str, slot: Slot, content: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint that a slot is not for.

    Args:
        algorithm: The method that has the slot.
        slot: What is wanted.
        content: Of the checkpoint.
        path: Where it lies.

    Raises:
        UsageError: Names the kind that it is, and the command that makes or uses the right one.
    """
    kind = content["args"].get("algorithm", PLAIN)
    if not isinstance(kind, str):
        raise UsageError(f"{path} is no checkpoint of an algorithm: its args say {kind!r}; name a model.pkl")
    is_special = slot.kind not in (None, PLAIN)
    student = find_distiller(kind)
    if is_special and kind != slot.kind:
        raise UsageError(
            f"{path} is a checkpoint of {kind}, and {algorithm}'s {slot.prefix} is one of {slot.kind}: make it with "
            f"'daft-domainbed train --algorithm {slot.kind}', or distil this one with --algorithm {student}"
        )
    if not is_special and find_method(kind).distilled_by:
        hint = "fine-tune an ERM checkpoint" if slot.starts else f"distil it with --algorithm {student}"
        raise UsageError(
            f"{path} is a checkpoint of {kind}, and {algorithm}'s {slot.prefix} is a plain one: make it with "
            f"'daft-domainbed train --algorithm {PLAIN}', or {hint}"
        )
    if slot.starts and find_method(kind).is_ours and not find_method(kind).is_plain:
        raise UsageError(
            f"{path} is a checkpoint of {kind}, whose weights are more than a network's: fine-tune an ERM checkpoint"
        )


def verify(
    content: Mapping[str, Any], path: Path, facts: RunFacts, slot: str = "teacher", *, is_auto: bool = False
) -> None:
    """Refuse a teacher whose provenance is not the run's.

    Args:
        content: Of its checkpoint.
        path: Where that lies.
        facts: Of the run.
        slot: Prefix of the slot that it is for.
        is_auto: Whether the store has it under the name that the run computed.

    Raises:
        UsageError: Each differing field is named with both values.
    """
    if adapted := content.get("adapted"):
        raise UsageError(
            f"teacher {path} was adapted to images of a held-out domain ({adapted}): name the checkpoint it came from"
        )
    theirs = _read_provenance(content, path, facts)
    if isinstance(declared := theirs.get("declared"), dict):
        _verify_declared(theirs, declared, path, facts)
        return
    differences = provenance.compare(theirs, facts.provenance)
    if differences:
        advice = f"Delete {path.parent}" if is_auto else f'Name another, or let "{slot}": "auto" make the right one'
        raise UsageError(
            f"teacher {path} was not trained on this run's data, so it may know the held-out domains: "
            f"{'; '.join(differences)}. {advice}"
        )


def _verify_declared(theirs: Mapping[str, Any], declared: Mapping[str, Any], path: Path, facts: RunFacts) -> None:
    """Refuse adopted weights that were declared to have seen a held-out domain, or are of other data."""
    ours = {"dataset": facts.args.dataset, "data_id": facts.args.data_id}
    if not is_same_data({name: theirs.get(name) for name in ours}, ours):
        raise UsageError(
            f"teacher {path} was adopted for {theirs.get('dataset')}, and this run is of {ours['dataset']}, which has "
            "other files: adopt its weights for these"
        )
    for name in ("num_classes", "input_shape"):
        if theirs[name] != facts.provenance[name]:
            raise UsageError(f"teacher {path}: {name} is {theirs[name]} there and {facts.provenance[name]} here")
    held_out = [facts.dataset.environments[env] for env in facts.args.test_envs]
    if seen := [name for name in held_out if name in declared.get("trained_on", [])]:
        raise UsageError(
            f"teacher {path} was declared to be trained on {', '.join(seen)}, which this run holds out: name another"
        )


def _read_provenance(content: Mapping[str, Any], path: Path, facts: RunFacts) -> Mapping[str, Any]:
    """Return a checkpoint's provenance: its own, the one beside it, or what its arguments imply."""
    own, beside = content.get("provenance"), path.parent / PROVENANCE_FILE
    if own is None and beside.is_file():
        try:
            own = json.loads(beside.read_text())
        except ValueError as error:
            raise UsageError(f"{beside} is not JSON ({error}): make the teacher again") from error
        _check_beside(own, content["args"], path)
    if own is None:
        own = _recompute_provenance(content["args"], path, facts)
    if not isinstance(own, dict) or not isinstance(own.get("fingerprints"), dict):
        raise UsageError(f"teacher {path} has no readable provenance: make it again")
    # What the model itself takes and answers is for its own file to say.
    return own | {"num_classes": content["model_num_classes"], "input_shape": list(content["model_input_shape"])}


def _check_beside(beside: Any, args: Mapping[str, Any], path: Path) -> None:
    """Refuse a provenance that was written for another run in the same folder: upstream's loop reuses folders."""
    names = [name for name in ("seed", *provenance.PLAIN_FIELDS) if name in args]
    ours = {name: args[name] for name in names}
    if isinstance(ours.get("dataset"), str):
        ours["dataset"] = name_dataset(ours["dataset"])
    if isinstance(ours.get("test_envs"), list):
        ours["test_envs"] = sorted(ours["test_envs"])
    theirs = beside if isinstance(beside, dict) else {}
    if different := [name for name in names if name in theirs and theirs[name] != ours[name]]:
        name = different[0]
        raise UsageError(
            f"{path.parent / PROVENANCE_FILE} and {path} are of different runs ({name} is {theirs[name]} and "
            f"{ours[name]}): make the teacher again in a folder of its own"
        )


def _recompute_provenance(args: Mapping[str, Any], path: Path, facts: RunFacts) -> dict[str, Any]:
    missing = [name for name in ("dataset", "test_envs", "trial_seed", "seed", "holdout_fraction") if name not in args]
    if missing:
        raise UsageError(f"teacher {path} does not say what it was trained on: its args lack {', '.join(missing)}")
    args = {"task": "domain_generalization", "uda_holdout_fraction": 0.0, **args}  # flags that DomainBed once had not
    try:
        dataset = name_dataset(args["dataset"])
        if dataset == facts.provenance["dataset"]:
            return rebuild_provenance(args, facts)
        plain = {name: args.get(name) for name in provenance.PLAIN_FIELDS}
        return plain | {"dataset": dataset, "test_envs": sorted(args["test_envs"]), "fingerprints": {}}
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f"teacher {path} does not say readably what it was trained on ({error})") from error


def rebuild_provenance(theirs: Mapping[str, Any], facts: RunFacts) -> dict[str, Any]:
    """Return the provenance that another run's recorded arguments imply on this run's data set."""
    names = ("trial_seed", "seed", "holdout_fraction", "task", "uda_holdout_fraction")
    values = {name: theirs[name] for name in names} | {"leave_out_classes": theirs.get("leave_out_classes")}
    other = replace(facts.args, **values, test_envs=list(theirs["test_envs"]), data_seed=None)
    with preserve_states():
        seed_everything(other.seed)
        data = build_data(facts.host, other, facts.hparams, facts.dataset.dataset_class)
    return provenance.describe(other, data.dataset.num_classes, data.dataset.input_shape, data.list_splits())
