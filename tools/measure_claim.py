"""Measure, beside accuracy, what the claim study's models do: agreement, calibration, robustness.

    python -m tools.measure_claim runs/claim SWEEP... [--trials 8] [--attacked_trials 2]

Adds to runs/claim/measures.jsonl a line a student that has none yet: its chosen checkpoint, and the teacher behind it.
Needs torchmetrics.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed import plugin
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.data.splits import build_data
from daft_domainbed.functional.attacks import run_pgd
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.host import contract
from daft_domainbed.host.checkpoints import build_model, load_checkpoint
from daft_domainbed.models.frozen import share_features
from daft_domainbed.runtime.layout import BEST_CHECKPOINT_FILE, DONE_FILE, name_teacher_file, read_first_record
from daft_domainbed.teachers.teacher import freeze_all
from tools.study import MEASURES

RADII = {"robust_small": 1 / 255, "robust_large": 2 / 255}
PGD_STEPS = 10
ATTACKED = 64  # images of the held-out domain, the first of its split; attacking all takes hours
BATCH = 128


def read_split(split: Any) -> tuple[Tensor, Tensor]:
    """Return all images, [N, C, H, W], and labels, [N], of a split that is not augmented."""
    pairs = [split[i] for i in range(len(split))]
    return torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])


@torch.no_grad()
def predict(model: Any, x: Tensor) -> Tensor:
    """Return logits, [N, K]."""
    return torch.cat([model.predict(part) for part in x.split(BATCH)])


def attack(model: Any, x: Tensor, y: Tensor, eps: float) -> float:
    """Return the accuracy under PGD (Madry et al., 2018), L-infinity, 10 steps, random start."""
    generator = torch.Generator().manual_seed(0)
    x_adv = run_pgd(
        lambda x: F.cross_entropy(model.predict(x), y, reduction="sum"),
        x,
        eps=eps,
        norm="linf",
        steps=PGD_STEPS,
        spec=INPUT_SPECS["unit"],
        generator=generator,
    )
    return measure_accuracy(predict(model, x_adv), y)


def measure_accuracy(logits: Tensor, y: Tensor) -> float:
    """Return the share of images whose largest logit is their class's."""
    return (logits.argmax(dim=1) == y).float().mean().item()


def measure(model: Any, held_out: tuple[Tensor, Tensor], trained: tuple[Tensor, Tensor], *, is_attacked: bool) -> Any:
    """Return what is measured of a model, and its logits on the held-out domain."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    x, y = held_out
    logits = predict(model, x)
    values = {
        "held_out": measure_accuracy(logits, y),
        "trained": measure_accuracy(predict(model, trained[0]), trained[1]),
        "calibration_error": multiclass_calibration_error(
            logits.softmax(dim=1), y, num_classes=logits.shape[1], n_bins=15, norm="l1"
        ).item(),
    }
    if is_attacked:
        values |= {name: attack(model, x[:ATTACKED], y[:ATTACKED], eps) for name, eps in RADII.items()}
    return values, logits


def measure_run(host: contract.Host, folder: Path, features: Path, *, is_attacked: bool) -> dict[str, Any]:
    """Measure a student's chosen checkpoint and its teacher, in float32.

    Args:
        host: Whose parts the run used.
        folder: The run's; images of the training domains are those of their out-splits.
        features: The folder of frozen backbones' features.
        is_attacked: Whether to measure robustness too.
    """
    first = read_first_record(folder)
    args, hparams = first["args"], first["hparams"]
    run = TrainArgs(**{name: args[name] for name in TrainArgs.__dataclass_fields__ if name in args})
    kind = contract.get_dataset_class(host, run.dataset)
    data = build_data(host, run, hparams | {"data_augmentation": False}, kind)
    held_out = read_split(data.in_splits[args["test_envs"][0]])
    splits = [read_split(split) for i, split in enumerate(data.out_splits) if i not in args["test_envs"]]
    trained = torch.cat([x for x, _ in splits]), torch.cat([y for _, y in splits])

    path = folder / BEST_CHECKPOINT_FILE
    student = build_model(load_checkpoint(path), path, host)
    freeze_all(student)
    line = {"trial": args["trial_seed"], "env": args["test_envs"][0]}
    line["student"], logits = measure(student, held_out, trained, is_attacked=is_attacked)
    if "teacher" in first:
        path = folder / name_teacher_file(first["teacher"])
        teacher = build_model(load_checkpoint(path), path, host)
        freeze_all(teacher)
        share_features(teacher, features, print)
        line["teacher"], beliefs = measure(teacher, held_out, trained, is_attacked=is_attacked)
        agreement = (logits.argmax(dim=1) == beliefs.argmax(dim=1)).float().mean().item()
        line["student"]["agreement"] = agreement
    return line


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the sweeps that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("sweeps", nargs="+", metavar="SWEEP")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--attacked_trials", type=int, default=2)
    args = parser.parse_args(argv)
    host = contract.find_host()
    plugin.register(host)
    measures = args.runs / MEASURES
    lines = [json.loads(line) for line in measures.read_text().splitlines()] if measures.is_file() else []
    measured = {(line["sweep"], line["trial"], line["env"]) for line in lines}
    with measures.open("a") as file:
        for sweep in args.sweeps:
            for done in sorted((args.runs / "report" / sweep).glob(f"*/{DONE_FILE}")):
                run = read_first_record(done.parent)["args"]
                trial = run["trial_seed"]
                if trial < args.trials and (sweep, trial, run["test_envs"][0]) not in measured:
                    is_attacked = trial < args.attacked_trials
                    line = measure_run(host, done.parent, args.runs / "features", is_attacked=is_attacked)
                    print(json.dumps({"sweep": sweep} | line), file=file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
