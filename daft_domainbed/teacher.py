"""Teachers: find or make the right one, prove that it saw nothing it should not, and freeze it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daft_domainbed import checkpoints, hparams, plugin, provenance
from daft_domainbed.attacks import InputSpec
from daft_domainbed.backbones import freeze
from daft_domainbed.errors import UsageError
from daft_domainbed.provenance import Request, RunFacts
from daft_domainbed.randomness import preserve_states

CHECKPOINT = "model.pkl"
PROVENANCE = "provenance.json"  # beside a model.pkl of upstream's own loop, which cannot carry ours


class Teacher:
    """A frozen model that answers with logits.

    It is no `nn.Module`, so that nothing of it enters the student's modules, state dict or optimizer, and no train()
    ever reaches it. It follows its input's device by itself.

    Attributes:
        model: The host's algorithm, every parameter frozen, in evaluation mode for ever.
        path: Of the checkpoint.
        hparams: The checkpoint's own.
        input_spec: How its training images were normalised.
        seed: Of the run that it teaches; attacks seed their own generators with it.
        facts: What the run's first record says of it: kind, path, hash, steps, seconds, accuracies.
    """

    def __init__(
        self, model: Any, path: Path, hparams: dict[str, Any], input_spec: InputSpec, seed: int, facts: dict[str, Any]
    ) -> None:
        freeze_all(model)
        self.model, self.path, self.hparams, self.input_spec = model, path, hparams, input_spec
        self.seed, self.facts = seed, facts
        self._device = torch.device("cpu")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return logits, [B, K], for the student's own view of the images, [B, C, H, W]."""
        self.follow(x)
        logits: Tensor = self.model.predict(x)
        return logits

    def follow(self, x: Tensor) -> None:
        """Move to the device of a tensor."""
        if x.device != self._device:
            self.model.to(x.device)
            self._device = x.device


def freeze_all(model: nn.Module) -> None:
    """Freeze every module of a model, in place."""
    for module in model.children():
        freeze(module)
    model.requires_grad_(False)
    model.eval()


def load_teacher(algorithm: str, wanted: Mapping[str, Any]) -> Teacher:
    """Find the teacher that the run in progress needs, make it where it is missing, verify it, and freeze it.

    All global random states are left as they were.

    Args:
        algorithm: AFT, KD or DAFT: who asks.
        wanted: The asking algorithm's hyperparameters.

    Raises:
        UsageError: The run's facts are unknown, or the teacher is missing, damaged, of the wrong kind, or was trained
            on something else; each differing field is named with both values.
    """
    facts = provenance.get_run_facts()
    if facts is None:
        raise UsageError(
            f"{algorithm} cannot check its teacher: nothing says which data set and held-out domains this run has; "
            f"start it with 'daft-domainbed train' or 'daft-domainbed host domainbed.scripts.train'"
        )
    with preserve_states():
        path = _resolve(algorithm, wanted, facts)
        content = checkpoints.load_checkpoint(path)
        _check_kind(algorithm, content, path)
        _verify(content, path, facts, is_auto=wanted["teacher"] == "auto")
        model = build_model(content, path, facts.host)
        described = describe_teacher(content, path, facts.output_dir)
        described["sha256"] = checkpoints.hash_state(model.state_dict())
        facts.announce(described)
        return Teacher(model, path, content["model_hparams"], facts.input_spec, facts.request.seed, described)


def build_model(content: Mapping[str, Any], path: Path, host: plugin.Host) -> Any:
    """Build a checkpoint's model from its own hyperparameters, with its weights loaded strictly."""
    name = content["args"].get("algorithm", "ERM")
    ours = name in hparams.TEACHER_KINDS  # our students and AFT teachers hold nothing but ERM's parameters
    # The checkpoint brings every weight: pretrained ones would be downloaded only to be overwritten.
    own = content["model_hparams"] | {"weights": "none"}
    try:
        kind = host.algorithms.ERM if ours else plugin.get_algorithm_class(host, name)
        model = kind(
            tuple(content["model_input_shape"]), content["model_num_classes"], content["model_num_domains"], own
        )
        model.load_state_dict(content["model_dict"])
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except Exception as error:  # a hostile file makes constructors fail in every way
        text = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: the weights do not fit the checkpoint's own hyperparameters ({text})") from error
    return model


# --- find or make ------------------------------------------------------------------------------------------------


def _resolve(algorithm: str, wanted: Mapping[str, Any], facts: RunFacts) -> Path:
    """Return the checkpoint that `teacher` names: a file, the best match in a folder, or the store's own."""
    where = wanted["teacher"]
    if where == "auto":
        job = plan_teacher(algorithm, wanted, facts.request, facts.user_hparams, facts.host, facts.precision)
        folder = facts.teachers_dir / job.identity
        if not (folder / "done").is_file() or not (folder / CHECKPOINT).is_file():
            facts.train(job.request, job.hparams, folder)
        return folder / CHECKPOINT
    path = Path(where).expanduser()
    if path.is_dir():
        return _search(algorithm, path, facts)
    return path


@dataclass(frozen=True)
class TeacherJob:
    """A teacher still to be trained: an ordinary training job, and the name of its folder in the store.

    Attributes:
        request: Its arguments.
        hparams: What goes into its `--hparams`.
        identity: A hash of what it is trained on and how; equal teachers are one teacher.
    """

    request: Request
    hparams: dict[str, Any]
    identity: str


def plan_teacher(
    algorithm: str,
    wanted: Mapping[str, Any],
    request: Request,
    user: Mapping[str, Any],
    host: plugin.Host,
    precision: str = "fp32",
) -> TeacherJob:
    """Return the job that makes the teacher of an algorithm with `teacher: "auto"`.

    The ERM teacher takes the host's ERM defaults, `teacher_*` and the user's explicit hyperparameters, never a
    student's random draw; an AFT teacher takes the `aft_*` values of the student it is made for.

    Args:
        algorithm: AFT, KD or DAFT: who asks.
        wanted: Its hyperparameters.
        request: Its arguments.
        user: What the user gave in `--hparams`.
        host: Whose defaults count.
        precision: Of the run's arithmetic.
    """
    kind = hparams.TEACHER_KINDS[algorithm]
    teacher_steps = request.steps if wanted["teacher_steps"] == "auto" else wanted["teacher_steps"]
    if kind == "ERM":
        own = {
            "backbone": wanted["teacher_backbone"],
            "weights": wanted["teacher_weights"],
            "backbone_frozen": wanted["teacher_frozen"],
            "backbone_input_size": wanted["teacher_input_size"],
        }
        steps = teacher_steps
    else:
        own = {
            name: value
            for name, value in wanted.items()
            if name.startswith(("aft_", "teacher")) and name != "aft_steps"
        }
        own["teacher_steps"] = teacher_steps
        steps = max(1, teacher_steps // 4) if wanted["aft_steps"] == "auto" else wanted["aft_steps"]
    defaults = plugin.get_default_hparams(host, kind, request.dataset, user)
    full = defaults | {name: value for name, value in user.items() if name in defaults} | own
    if kind == "AFT":
        full |= resolve_aft(full)
    dataset, test_envs = provenance.name_dataset(request.dataset), sorted(request.test_envs)
    # Elsewhere the data do not depend on the seed, so runs of every seed can share a teacher.
    is_seeded = plugin.is_seeded(plugin.get_dataset_class(host, request.dataset))
    data_seed = request.seed if request.data_seed is None else request.data_seed
    job = replace(
        request,
        algorithm=kind,
        test_envs=tuple(test_envs),
        steps=steps,
        seed=host.misc.seed_hash(dataset, test_envs, request.trial_seed),
        data_seed=data_seed if is_seeded else None,
    )
    identity = {
        "algorithm": kind,
        "dataset": dataset,
        "test_envs": test_envs,
        "trial_seed": request.trial_seed,
        "holdout_fraction": request.holdout_fraction,
        "task": request.task,
        "uda_holdout_fraction": request.uda_holdout_fraction,
        "seed": job.seed,
        "data_seed": job.data_seed,
        "steps": steps,
        "precision": precision,
        "hparams": full,
        "teacher": plan_teacher(kind, full, job, user, host, precision).identity if kind == "AFT" else None,
    }
    text = json.dumps(identity, sort_keys=True)
    # Every hyperparameter is spelt out, so that equal teachers have equal arguments, whoever asks for them.
    return TeacherJob(job, full, f"{kind}-{sha256(text.encode()).hexdigest()[:16]}")


def resolve_aft(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the adversarial hyperparameters with every "auto" replaced by its value.

    Raises:
        UsageError: The norm does not go with the attack.
    """
    attack, norm, steps = wanted["aft_attack"], wanted["aft_norm"], wanted["aft_attack_steps"]
    if attack == "features":
        if norm == "linf":
            raise UsageError('hyperparameter aft_norm is "linf": an attack on features is measured in "l2"')
        norm, auto, auto_steps = "l2", 0.025, 0
    else:
        norm = "linf" if norm == "auto" else norm
        auto, auto_steps = (4 / 255 if norm == "linf" else 0.5), 3
        if steps == 0:
            raise UsageError("hyperparameter aft_attack_steps is 0: an attack on pixels takes at least 1 step")
    return {
        "aft_norm": norm,
        "aft_eps": hparams.parse_eps(wanted["aft_eps"], auto),
        "aft_attack_steps": auto_steps if steps == "auto" else steps,
    }


def _search(algorithm: str, folder: Path, facts: RunFacts) -> Path:
    """Return the match with the highest mean out-split accuracy over *training* environments.

    A distilled student is no match, though its file may be named: KD is the control for DAFT, and a folder that holds
    both kinds of runs would else give it DAFT's own student as the teacher.
    """
    best, best_accuracy, reasons = None, -math.inf, []
    paths = sorted(
        path for pattern in (CHECKPOINT, f"*/{CHECKPOINT}", f"*/*/{CHECKPOINT}") for path in folder.glob(pattern)
    )
    if not paths:
        raise UsageError(
            f"no {CHECKPOINT} in {folder} or two levels below: name a checkpoint, a folder of runs, or auto"
        )
    for path in paths:
        try:
            content = checkpoints.load_checkpoint(path)
            _check_kind(algorithm, content, path)
            if (kind := content["args"].get("algorithm")) in hparams.DISTILLING:
                raise UsageError(f"{path} is a student of {kind}; name the file itself if it is to teach")
            _verify(content, path, facts)
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


def _get_validation_accuracy(path: Path, facts: RunFacts) -> float:
    record = _read_records(path.parent)[-1]
    held_out = set(facts.request.test_envs)  # their accuracies are never read
    keys = [f"env{i}_out_acc" for i in range(len(facts.splits)) if i not in held_out]
    values = [record[key] for key in keys if key in record]
    return sum(values) / len(values) if values else -math.inf


# --- verify ------------------------------------------------------------------------------------------------------


def _check_kind(algorithm: str, content: Mapping[str, Any], path: Path) -> None:
    kind = content["args"].get("algorithm", "ERM")
    if not isinstance(kind, str):
        raise UsageError(f"{path} is no checkpoint of an algorithm: its args say {kind!r}; name a model.pkl")
    wants_aft = hparams.TEACHER_KINDS[algorithm] == "AFT"
    if wants_aft and kind != "AFT":
        raise UsageError(
            f"{path} is a checkpoint of {kind}, and {algorithm}'s teacher is an adversarially fine-tuned one: make it "
            f"with 'daft-domainbed train --algorithm AFT', or distil this one with --algorithm KD"
        )
    if algorithm == "AFT" and kind == "SMA":
        raise UsageError(
            f"{path} is a checkpoint of SMA, whose head belongs to an average of networks: fine-tune an ERM checkpoint"
        )
    if not wants_aft and kind == "AFT":
        hint = "distil it with --algorithm DAFT" if algorithm == "KD" else "fine-tune an ERM checkpoint"
        raise UsageError(
            f"{path} is a checkpoint of AFT, and {algorithm}'s teacher is a plain one: make it with "
            f"'daft-domainbed train --algorithm ERM', or {hint}"
        )


def _verify(content: Mapping[str, Any], path: Path, facts: RunFacts, *, is_auto: bool = False) -> None:
    theirs = _read_provenance(content, path, facts)
    differences = provenance.compare(theirs, facts.provenance)
    if differences:
        advice = f"Delete {path.parent}" if is_auto else 'Name another, or let "teacher": "auto" make the right one'
        raise UsageError(
            f"teacher {path} was not trained on this run's data, so it may know the held-out domains: "
            f"{'; '.join(differences)}. {advice}"
        )


def _read_provenance(content: Mapping[str, Any], path: Path, facts: RunFacts) -> Mapping[str, Any]:
    """Return a checkpoint's provenance: its own, the one beside it, or what its arguments imply."""
    own = content.get("provenance")
    if own is None and (path.parent / PROVENANCE).is_file():
        try:
            own = json.loads((path.parent / PROVENANCE).read_text())
        except ValueError as error:
            raise UsageError(f"{path.parent / PROVENANCE} is not JSON ({error}): make the teacher again") from error
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
        ours["dataset"] = provenance.name_dataset(ours["dataset"])
    if isinstance(ours.get("test_envs"), list):
        ours["test_envs"] = sorted(ours["test_envs"])
    theirs = beside if isinstance(beside, dict) else {}
    if different := [name for name in names if name in theirs and theirs[name] != ours[name]]:
        name = different[0]
        raise UsageError(
            f"{path.parent / PROVENANCE} and {path} are of different runs ({name} is {theirs[name]} and {ours[name]}): "
            f"make the teacher again in a folder of its own"
        )


def _recompute_provenance(args: Mapping[str, Any], path: Path, facts: RunFacts) -> dict[str, Any]:
    missing = [name for name in ("dataset", "test_envs", "trial_seed", "seed", "holdout_fraction") if name not in args]
    if missing:
        raise UsageError(f"teacher {path} does not say what it was trained on: its args lack {', '.join(missing)}")
    args = {"task": "domain_generalization", "uda_holdout_fraction": 0.0, **args}  # flags that DomainBed once had not
    try:
        dataset = provenance.name_dataset(args["dataset"])
        if dataset == facts.provenance["dataset"]:
            return facts.rebuild(args)
        plain = {name: args.get(name) for name in provenance.PLAIN_FIELDS}
        return plain | {"dataset": dataset, "test_envs": sorted(args["test_envs"]), "fingerprints": {}}
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f"teacher {path} does not say readably what it was trained on ({error})") from error


# --- describe ----------------------------------------------------------------------------------------------------


def describe_teacher(content: Mapping[str, Any], path: Path, output_dir: Path) -> dict[str, Any]:
    """Return what a student's first record says of its teacher; never more than the teacher's own records say.

    Args:
        content: The teacher's checkpoint.
        path: Of that.
        output_dir: The student's folder, to which paths are relative.
    """
    records = _read_records(path.parent)
    first, last = records[0], records[-1]
    if path.name == CHECKPOINT:
        own = last
    else:  # one from the middle of a run: upstream's do not say from where
        own = next((record for record in records if "step" in record and record["step"] == content.get("step")), {})
    described: dict[str, Any] = {
        "algorithm": content["args"].get("algorithm", "ERM"),
        "path": os.path.relpath(path.parent, output_dir),
        "accuracies": {key: value for key, value in own.items() if key.startswith("env") and key.endswith("_acc")},
    }
    if "step" in own:
        described["steps"] = own["step"] + 1
        described["seconds"] = last.get("seconds")
    if "teacher" in first:
        inner = dict(first["teacher"])
        inner["path"] = os.path.relpath(path.parent / inner["path"], output_dir)
        described["teacher"] = inner
    return described


def _read_records(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / "results.jsonl").read_text().splitlines()
        return [record for line in lines if isinstance(record := json.loads(line), dict)] or [{}]
    except (OSError, ValueError):  # a checkpoint that was moved without its records teaches as well
        return [{}]
