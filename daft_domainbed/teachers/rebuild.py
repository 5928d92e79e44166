"""A checkpoint as a model again, with the teachers that its constructor takes where it is more than a plain one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from daft_domainbed.arguments import TrainArgs, find_data_path
from daft_domainbed.errors import UsageError
from daft_domainbed.host.checkpoints import build_model, load_checkpoint
from daft_domainbed.host.contract import Host, describe_dataset
from daft_domainbed.methods import PLAIN, Slot, find_method, list_slots
from daft_domainbed.models.weights import hash_state
from daft_domainbed.plugin.defaults import get_default_hparams
from daft_domainbed.runtime.layout import list_teachers, name_teacher_file, read_first_record
from daft_domainbed.runtime.randomness import preserve_states, seed_everything
from daft_domainbed.teachers.facts import RunFacts, run_in_progress
from daft_domainbed.teachers.teacher import PretrainedNetwork, Teacher, describe_teacher


def rebuild_model(content: Mapping[str, Any], path: Path, host: Host) -> Any:
    """Return a checkpoint's model, its weights loaded strictly.

    A method that holds more than ERM's weights is built by its own class, which takes its teachers: those that the
    record beside the checkpoint names.

    Args:
        content: Of the checkpoint.
        path: Where it lies.
        host: Registered.

    Raises:
        UsageError: The weights do not fit, the algorithm is unknown, or a teacher that is needed is gone.
    """
    algorithm = content["args"].get("algorithm", PLAIN)
    method = find_method(algorithm) if isinstance(algorithm, str) else None
    if method is None or method.is_plain or not method.slots:
        return build_model(content, path, host)
    known = {field: content["args"][field] for field in TrainArgs.__dataclass_fields__ if field in content["args"]}
    args = TrainArgs(**known)
    run = RunFacts(
        args=args,
        user_hparams={},
        hparams=content["model_hparams"],
        dataset=describe_dataset(host, args.dataset, content["model_hparams"], find_data_path(content["args"])),
        num_classes=content["model_num_classes"],
        input_shape=tuple(content["model_input_shape"]),
        splits=[],
        host=host,
        output_dir=path.parent,
        teachers_dir=path.parent,
    )
    recorded = list_teachers(read_first_record(path.parent))
    slots = list_slots(algorithm, content["model_hparams"])
    teachers = {slot.prefix: _find_again(slot, run, recorded.get(slot.prefix) or {}, path) for slot in slots}
    with run_in_progress(replace(run, teachers=teachers)):
        return build_model(content, path, host)


def _find_again(slot: Slot, run: RunFacts, recorded: Mapping[str, Any], path: Path) -> Teacher:
    if "path" not in recorded:
        if slot.kind is None and run.hparams[slot.prefix] == "auto":
            return build_pretrained(slot, run)
        raise UsageError(f"{path} needs its {slot.prefix} to be built, and no record beside it says which that was")
    place = path.parent / name_teacher_file(recorded)
    content = load_checkpoint(place)
    described = describe_teacher(content, place, path.parent)
    model = rebuild_model(content, place, run.host)
    if hash_state(model.state_dict()) != recorded.get("sha256"):
        raise UsageError(f"{path} learnt from another {slot.prefix} than {place} is now: bring that one back")
    return Teacher(model, place, content["model_hparams"], run.dataset.input_spec, run.args.seed, described)


def build_pretrained(slot: Slot, run: RunFacts) -> Teacher:
    """Return a network that nobody has to train: it has features, and no logits.

    Args:
        slot: Whose hyperparameters describe it.
        run: That learns from it; without pretrained weights, its seed decides on them.
    """
    hparams = get_default_hparams(run.host, PLAIN, run.dataset) | {
        "backbone": run.hparams[f"{slot.prefix}_backbone"],
        "weights": run.hparams[f"{slot.prefix}_weights"],
        "backbone_input_size": run.hparams[f"{slot.prefix}_input_size"],
        "backbone_frozen": True,
    }
    with preserve_states():
        seed_everything(run.args.seed)
        model = PretrainedNetwork(run.host.networks.Featurizer(run.input_shape, hparams), slot.prefix)
    described = {
        "algorithm": None,
        "backbone": hparams["backbone"],
        "weights": hparams["weights"],
        "sha256": hash_state(model.state_dict()),
    }
    return Teacher(model, Path(hparams["backbone"]), hparams, run.dataset.input_spec, run.args.seed, described)
