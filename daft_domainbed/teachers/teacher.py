"""A teacher: a frozen model that answers with logits, and what a record says of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daft_domainbed.errors import UsageError
from daft_domainbed.functional.input_spec import InputSpec
from daft_domainbed.methods import PLAIN
from daft_domainbed.models.backbones import freeze_backbone
from daft_domainbed.plugin.defaults import FOLDER, NETWORK, list_hparams
from daft_domainbed.runtime.layout import CHECKPOINT_FILE, list_teachers, name_teacher_file, pack_teachers, read_records
from daft_domainbed.runtime.origins import list_origins

_NETWORK = ("backbone", "backbone_input_size", "input_size", "resnet18", "vit", "dinov2")  # what tells networks apart
# How a network is trained, not what it is.
_TRAINING = {"lr", "weight_decay", "batch_size", "class_balanced", "data_augmentation", "backbone_frozen"}


class Teacher:
    """A frozen model that answers with logits.

    It is no `nn.Module`, so that nothing of it enters the student's modules, state dict or optimizer, and no train()
    ever reaches it. It follows its input's device by itself.

    Attributes:
        model: The host's algorithm, every parameter frozen, always in evaluation mode.
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

    def get_architecture(self) -> dict[str, Any]:
        """Return the hyperparameters that its network was built from, for a method that starts from its weights."""
        methods_own = list_hparams(self.facts["algorithm"]).keys() - NETWORK.keys() - FOLDER.keys()
        architecture = {name: value for name, value in self.hparams.items() if name not in methods_own | _TRAINING}
        frozen = self.hparams.get("backbone_frozen")  # a head that was trained alone says nothing of what comes next
        return architecture | ({"backbone_frozen": frozen} if isinstance(frozen, str) else {})

    def copy_weights_to(self, network: nn.Module, kind: str, advice: str) -> None:
        """Start a network, featurizer and head, from this one's weights.

        Args:
            network: Built as `get_architecture` says.
            kind: The method whose checkpoints have such a network.
            advice: What to do with a checkpoint that has none.

        Raises:
            UsageError: The weights do not fit.
        """
        try:
            network.load_state_dict(self.model.network.state_dict())
        except (AttributeError, RuntimeError) as error:
            raise UsageError(f"{self.path} has no featurizer and head as {kind} has: {advice}") from error

    def follow(self, x: Tensor) -> None:
        """Move to the device of a tensor."""
        if x.device != self._device:
            self.model.to(x.device)
            self._device = x.device


class PretrainedNetwork(nn.Module):
    """A backbone that nobody trained on the data: it has features, and no head for the classes.

    Args:
        featurizer: Maps images, [B, C, H, W], to features, [B, D].
        prefix: Of the slot, for messages.
    """

    def __init__(self, featurizer: nn.Module, prefix: str) -> None:
        super().__init__()
        self.featurizer, self.prefix = featurizer, prefix

    def predict(self, x: Tensor) -> Tensor:
        """Refuse: there are no logits.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"the {self.prefix} is a pretrained network without a head: name a checkpoint to have logits")


def freeze_all(model: nn.Module) -> None:
    """Freeze every module of a model, in place."""
    for module in model.children():
        freeze_backbone(module)
    model.requires_grad_(False)
    model.eval()


def list_all_origins(content: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, str]:
    """Return what a checkpoint's network, and those of its teachers, started from.

    Args:
        content: The checkpoint.
        first: The first record beside it, which may be empty.
    """
    origins = list_origins(content["model_hparams"], tuple(content["model_input_shape"]))
    declared = (content.get("provenance") or {}).get("declared")
    if isinstance(declared, dict):
        seen = ", ".join(map(str, declared.get("trained_on", [])))
        origins["adopted"] = f"adopted weights, declared to be trained on {seen}; trial and splits not checked"
    for known in (content.get("origins"), first.get("origins")):
        origins |= known if isinstance(known, dict) else {}
    return origins


def describe_teacher(content: Mapping[str, Any], path: Path, output_dir: Path) -> dict[str, Any]:
    """Return what a student's first record says of its teacher; never more than the teacher's own records say.

    Args:
        content: The teacher's checkpoint.
        path: Of that.
        output_dir: The student's folder, to which paths are relative.
    """
    records = read_records(path.parent) or [{}]
    first, last = records[0], records[-1]
    if path.name == CHECKPOINT_FILE:
        own = last
    else:  # one from the middle of a run: upstream's do not say from where
        own = next((record for record in records if "step" in record and record["step"] == content.get("step")), {})
    described: dict[str, Any] = {
        "algorithm": content["args"].get("algorithm", PLAIN),
        "path": os.path.relpath(path, output_dir),
        "accuracies": {key: value for key, value in own.items() if key.startswith("env") and key.endswith("_acc")},
    }
    described["network"] = {name: value for name, value in content["model_hparams"].items() if name in _NETWORK}
    if path.name != CHECKPOINT_FILE:
        described["file"] = path.name
    if "step" in own:
        described["steps"] = own["step"] + 1
        described["seconds"] = last.get("seconds")
    if origins := list_all_origins(content, first):
        described["origins"] = origins
    inner = {
        prefix: facts
        | ({"path": os.path.relpath(path.parent / name_teacher_file(facts), output_dir)} if "path" in facts else {})
        for prefix, facts in list_teachers(first).items()
    }
    return described | pack_teachers(inner)
