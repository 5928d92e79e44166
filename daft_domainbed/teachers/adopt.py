"""A plain state dict as a teacher: a checkpoint whose provenance is what the user declares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.data.left_out import find_class_names, list_classes
from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.host.contract import describe_dataset, find_host
from daft_domainbed.hparams import parse_json
from daft_domainbed.methods import PLAIN
from daft_domainbed.models import weights
from daft_domainbed.models.plain_weights import read_plain_weights
from daft_domainbed.plugin.defaults import check_user_hparams, get_default_hparams
from daft_domainbed.plugin.registration import register
from daft_domainbed.runtime.layout import CHECKPOINT_FILE
from daft_domainbed.runtime.randomness import preserve_states


@dataclass(frozen=True)
class AdoptArgs:
    """What is adopted, and what is declared of it.

    Attributes:
        path: Of the file of weights.
        backbone: As for the hyperparameter of that name.
        run: The data set, with its place, and the folder of the checkpoint.
        trained_on: Names of the domains that it has seen.
        classes: What the head's outputs stand for, in their order; the data set's own order without them.
    """

    path: Path
    backbone: str
    run: TrainArgs
    trained_on: Sequence[str]
    classes: Sequence[str] = field(default_factory=list)


def adopt(args: AdoptArgs) -> Path:
    """Write a checkpoint that holds somebody else's weights, and return its path.

    Raises:
        UsageError: The weights, the classes or the domains do not fit; names what does not.
    """
    folder = Path(args.run.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--output_dir {folder} holds something already: choose another")
    host, user = find_host(args.run.host), parse_json(args.run.hparams)
    register(host)
    facts = describe_dataset(host, args.run.dataset, user, args.run.data_path)
    check_user_hparams(host, user, [PLAIN], facts, asked=["adopt"])
    seen = _find_domains(args.trained_on, facts.environments, args.run.dataset)
    hparams = get_default_hparams(host, PLAIN, facts) | user | {"backbone": args.backbone, "weights": "none"}
    held_out = [i for i, name in enumerate(facts.environments) if name not in seen]
    with preserve_states():
        dataset = facts.dataset_class(args.run.data_dir, held_out, hparams | {"data_augmentation": False})
        model = host.algorithms.ERM(tuple(dataset.input_shape), dataset.num_classes, len(seen), dict(hparams))
    if not isinstance(model.classifier, nn.Linear):
        raise UsageError("nonlinear_classifier: adopt takes a backbone with one linear head for the classes")
    inner = getattr(model.featurizer, "network", model.featurizer)
    found = read_plain_weights(args.path, inner, model.featurizer.n_outputs, args.backbone)
    order = _order_classes(args, len(found.weight), list_classes(dataset))
    inner.load_state_dict(found.backbone, strict=False)  # counters of batches may lack, nothing else: that was checked
    with torch.no_grad():
        model.classifier.weight.copy_(found.weight[order])
        model.classifier.bias.copy_(found.bias[order])
    run = {**asdict(args.run), "algorithm": PLAIN, "test_envs": held_out}
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "args": run,
        "model_input_shape": tuple(dataset.input_shape),
        "model_num_classes": dataset.num_classes,
        "model_num_domains": len(seen),
        "model_hparams": hparams,
        "model_dict": model.state_dict(),
        "class_names": find_class_names(dataset),
        "provenance": {
            "dataset": args.run.dataset,
            "data_id": args.run.data_id,
            "declared": {"trained_on": seen, "file": args.path.name, "classes": list(args.classes) or "in order"},
            "fingerprints": {},
        },
    }
    weights.save(content, folder / CHECKPOINT_FILE)
    return folder / CHECKPOINT_FILE


def _find_domains(names: Sequence[str], known: Sequence[str], dataset: str) -> list[str]:
    for name in names:
        if name not in known:
            raise UsageError(
                f"--trained_on {name}: {dataset} has no such domain.{suggest(name, known)} They are {', '.join(known)}"
            )
    return [name for name in known if name in names]


def _order_classes(args: AdoptArgs, n_outputs: int, known: list[str]) -> list[int]:
    """Return which output of the head stands for each class of the data set."""
    if n_outputs != len(known):
        raise UsageError(
            f"{args.path}: the head has {n_outputs} outputs, and {args.run.dataset} {len(known)} classes "
            f"({', '.join(known[:10])}{' ...' if len(known) > 10 else ''})"
        )
    names = list(args.classes) or known
    if lost := [name for name in names if name not in known]:
        raise UsageError(
            f"--classes {lost[0]}: {args.run.dataset} has no such class.{suggest(lost[0], known)} "
            f"They are {', '.join(known)}"
        )
    if len(names) != len(known) or len({*names}) != len(names):
        raise UsageError(
            f"--classes names {len({*names})} classes: name each of the {len(known)} once, in the head's order"
        )
    return [names.index(name) for name in known]
