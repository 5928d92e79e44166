"""What adversarial fine-tuning does to a teacher: each AFT teacher of a store beside the ERM teacher that it came from.

python -m tools.measure_teachers STORE [--trial N] [--feature_cache DIR]    a line of JSON a teacher

Held-out style: accuracy, negative log-likelihood, the distance of a drawing's features to the nearest decision boundary
(negative where it is wrong) in shares of the mean feature norm, and agreement: how often the same class is said of a
drawing and of the same thing in a training style. Training styles: the entropy of beliefs. Images are not augmented.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed import plugin
from daft_domainbed.embedded.data import load_emoji_styles
from daft_domainbed.functional.entropy import get_mean_entropy
from daft_domainbed.host import contract
from daft_domainbed.host.checkpoints import build_model, load_checkpoint
from daft_domainbed.models.frozen import share_features
from daft_domainbed.runtime.layout import CHECKPOINT_FILE, DONE_FILE, name_teacher_file, read_first_record
from daft_domainbed.teachers.teacher import freeze_all

BATCH = 64


class Beliefs(NamedTuple):
    """What a model makes of one style: features, [N, D], logits, [N, K], and labels, [N], of things, by code point."""

    features: Tensor
    logits: Tensor
    labels: Tensor
    things: tuple[str, ...]


@torch.no_grad()
def look(model: Any, style: str) -> Beliefs:
    """Have a model with featurizer and classifier look at every drawing of a style."""
    sheet = load_emoji_styles()[style]
    images = torch.tensor(sheet.images).float() / 255
    features = torch.cat([model.featurizer(part) for part in images.split(BATCH)])
    return Beliefs(features, model.classifier(features), torch.tensor(sheet.labels), sheet.code_points)


def measure(held_out: Beliefs, trained: Sequence[Beliefs], head: nn.Linear) -> dict[str, float]:
    """Return what is measured of a teacher.

    Args:
        held_out: Its beliefs about the held-out style.
        trained: About each training style.
        head: Its linear head.
    """
    logits = torch.cat([beliefs.logits for beliefs in trained])
    return {
        "accuracy": 100 * (held_out.logits.argmax(1) == held_out.labels).float().mean().item(),
        "nll": F.cross_entropy(held_out.logits, held_out.labels).item(),
        "margin": find_margins(held_out, head).mean().item(),
        "agreement": 100 * sum(count_agreement(held_out, beliefs) for beliefs in trained) / len(trained),
        "entropy": get_mean_entropy(logits, 1.0),
    }


def find_margins(beliefs: Beliefs, head: nn.Linear) -> Tensor:
    """Return each drawing's signed distance to the nearest boundary of its class, in shares of the mean norm, [N]."""
    right = beliefs.logits.gather(1, beliefs.labels[:, None])
    weights = head.weight.detach()
    distances = (right - beliefs.logits) / torch.cdist(weights[beliefs.labels], weights)
    distances.scatter_(1, beliefs.labels[:, None], float("inf"))
    return distances.min(dim=1).values / beliefs.features.norm(dim=1).mean()


def count_agreement(one: Beliefs, other: Beliefs) -> float:
    """Return the share of things drawn in both styles of which the same class is said."""
    said = dict(zip(other.things, other.logits.argmax(1).tolist(), strict=True))
    pairs = [
        (mine, said[thing])
        for thing, mine in zip(one.things, one.logits.argmax(1).tolist(), strict=True)
        if thing in said
    ]
    return sum(mine == theirs for mine, theirs in pairs) / len(pairs)


def measure_store(store: Path, trial: int | None, feature_cache: Path | None) -> Iterator[dict[str, Any]]:
    """Yield what is measured of each AFT teacher and of the teacher that it began from, which is yielded once."""
    host = contract.find_host()
    plugin.register(host)
    done: set[Path] = set()
    for folder in sorted(path.parent for path in store.glob(f"AFT-*/{DONE_FILE}")):
        first = read_first_record(folder)
        if trial is not None and first["args"]["trial_seed"] != trial:
            continue
        for teacher in (folder, (folder / name_teacher_file(first["teacher"])).resolve().parent):
            if teacher in done:
                continue
            done.add(teacher)
            yield measure_teacher(host, teacher, feature_cache)


def measure_teacher(host: contract.Host, folder: Path, feature_cache: Path | None) -> dict[str, Any]:
    """Return what is measured of one teacher, with the trial, held-out style and radius that it stands for."""
    first = read_first_record(folder)
    path = folder / CHECKPOINT_FILE
    model = build_model(load_checkpoint(path), path, host)
    freeze_all(model)
    if feature_cache is not None:
        share_features(model, feature_cache, print)
    args, hparams = first["args"], first["hparams"]
    (env,) = args["test_envs"]
    beliefs = {name: look(model, name) for name in first["environments"]}
    held_out = first["environments"][env]
    return {
        "teacher": folder.name,
        "kind": args["algorithm"],
        "radius": hparams.get("aft_eps"),
        "backbone": hparams["backbone"],
        "trial": args["trial_seed"],
        "env": held_out,
        **measure(beliefs[held_out], [b for name, b in beliefs.items() if name != held_out], model.classifier),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--trial", type=int)
    parser.add_argument("--feature_cache", type=Path)
    args = parser.parse_args(argv)
    for line in measure_store(args.store, args.trial, args.feature_cache):
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
