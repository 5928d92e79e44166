"""Measure what the comparisons of related systems ask of a finished run, beside accuracy.

    python -m tools.measure_related runs/related/at/ce [RUN...] [--device cpu]

Writes measures.json into the folder of each run that has none: of the checkpoint that training-domain validation chose,
on the in-split of the held-out domain; of lists, what the last record says. What is asked depends on
the comparison, the second folder below `runs`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.data.outside import OutsideStream
from daft_domainbed.errors import RunError
from daft_domainbed.evaluation.confidence import measure_auroc, measure_reliability
from daft_domainbed.evaluation.fidelity import (
    measure_agreement,
    measure_cka,
    measure_cosine_correlation,
    measure_kl,
)
from daft_domainbed.evaluation.robustness import Threat, find_lost_restarts
from daft_domainbed.evaluation.square import find_square_lost
from daft_domainbed.evaluation.subject import Subject, load_subject
from daft_domainbed.functional.attacks import Norm
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.functional.out_distribution import raise_confidence
from daft_domainbed.functional.similarity import vote_by_neighbours
from daft_domainbed.host.checkpoints import build_model, load_checkpoint
from daft_domainbed.models.frozen import share_features
from daft_domainbed.runtime.files import write_text
from daft_domainbed.runtime.layout import (
    BEST_CHECKPOINT_FILE,
    CHECKPOINT_FILE,
    DONE_FILE,
    RECORDS_FILE,
    read_first_record,
)
from daft_domainbed.teachers.teacher import freeze_all
from tools.ranking import read_list_measures

MEASURES_FILE = "measures.json"
BATCH, ATTACKED = 256, 1024  # images at a time
EPS: dict[Norm, float] = {"linf": 8 / 255, "l2": 0.5}
MOST = 200  # images that the dear attacks are shown, drawn by seed 0
QUERIES = 500
OUTSIDE, OUTSIDE_STEPS = 256, 20  # images of each set, and steps of the attack on them
RADII = (0.5, 1.0)  # in L2 around outside images

# Norm, steps, restarts.
ATTACKS: dict[str, tuple[Norm, int, int]] = {
    "linf_pgd20": ("linf", 20, 1),
    "l2_pgd20": ("l2", 20, 1),
    "linf_pgd50x5": ("linf", 50, 5),
    "l2_pgd50x3": ("l2", 50, 3),
}
PROBES = Path("runs/related/tintem/sne/teachers")  # on the network that all of TinTeM's arms learn from


def measure(folder: Path, study: str, device: str = "cpu") -> dict[str, Any]:
    """Measure a run and write what comes of it into its folder.

    Args:
        folder: Of a finished run.
        study: Says what is asked: its first part is a comparison below sweeps/related.
        device: Where to compute.
    """
    if (measures := read_list_measures(folder)) is not None:
        write_text(folder / MEASURES_FILE, json.dumps({"study": study} | measures) + "\n")
        return measures
    started = time.monotonic()
    path = folder / BEST_CHECKPOINT_FILE
    path = path if path.is_file() else folder / CHECKPOINT_FILE
    subject = load_subject(path, folder.name, device=torch.device("cuda" if device == "auto" else device))
    (env,) = subject.held_out
    name = subject.environments[env]
    x, y = subject.load(name, subject.choose(0, 0)[name])
    logits = ask(subject.model, x)
    values: dict[str, Any] = {
        "study": study,
        "algorithm": subject.algorithm,
        "trial": subject.run.trial_seed,
        "env": env,
        "environment": name,
        "n": count(torch.ones_like(y, dtype=torch.bool), y, subject.n_classes),
        "clean": count(logits.argmax(1) == y, y, subject.n_classes),
        "ece": measure_reliability(logits, y).ece,
        "nll": F.cross_entropy(logits, y).item(),
    }
    for question in QUESTIONS.get(study.split("/")[0], ()):
        values |= question(subject, x, y)
    values["seconds"] = round(time.monotonic() - started, 2)
    write_text(folder / MEASURES_FILE, json.dumps(values) + "\n")
    return values


@torch.no_grad()
def ask(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return a model's answers, batch by batch."""
    return torch.cat([model(part) for part in x.split(BATCH)])


def count(chosen: Tensor, y: Tensor, n_classes: int) -> list[int]:
    """Return how many of the chosen examples, [B], each class has."""
    return torch.bincount(y[chosen].cpu(), minlength=n_classes).tolist()


def attack(subject: Subject, x: Tensor, y: Tensor, norm: Norm, steps: int, restarts: int) -> Tensor:
    """Return which examples withstand PGD from random starts, with steps of a quarter of the radius, [B]."""
    generator = torch.Generator().manual_seed(0)
    parts = zip(x.split(ATTACKED), y.split(ATTACKED), strict=True)
    stand = [
        find_lost_restarts(
            subject.model, x, y, Threat(norm), eps=EPS[norm], steps=steps, restarts=restarts, generator=generator
        )[1]
        for x, y in parts
    ]
    return torch.cat(stand)


def ask_attacks(subject: Subject, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return how many of each class of some images withstand attacks that training does not know, or not so strong."""
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:MOST].to(y.device)
    x, y = x[chosen], y[chosen]
    stands = {name: attack(subject, x, y, *ATTACKS[name]) for name in ("linf_pgd50x5", "l2_pgd50x3")}
    generator = torch.Generator().manual_seed(0)
    stands["linf_square"] = ~find_square_lost(
        subject.model, x, y, Threat("linf"), eps=EPS["linf"], queries=QUERIES, generator=generator
    )
    return {name: count(stand, y, subject.n_classes) for name, stand in stands.items()} | {
        "n_attacked": count(torch.ones_like(y, dtype=torch.bool), y, subject.n_classes)
    }


def ask_pgd(subject: Subject, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return how many of each class withstand PGD of 20 steps, of all images."""
    return {"linf_pgd20": count(attack(subject, x, y, *ATTACKS["linf_pgd20"]), y, subject.n_classes)}


def ask_lambdas(subject: Subject, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return how many of each class are right, clean and under PGD, at each lambda of OAT's."""
    algorithm: Any = subject.model.algorithm
    curve = {}
    for value in algorithm.lambdas:
        algorithm.set_lambda(value)
        curve[f"{value:g}"] = {
            "clean": count(ask(subject.model, x).argmax(1) == y, y, subject.n_classes),
            "linf_pgd20": count(attack(subject, x, y, *ATTACKS["linf_pgd20"]), y, subject.n_classes),
        }
    return {"lambdas": curve}


def ask_outside(subject: Subject, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return the AUROC of confidence against images of no class: as they are, and at their most confident near by."""
    own = ask(subject.model, x).softmax(1).amax(1)
    outside = {}
    for name in ("digits", "noise", "smooth"):
        others = draw_outside(name, tuple(x.shape[1:])).to(x)
        radii = {"0": others} | {
            f"{eps:g}": torch.cat(
                [
                    raise_confidence(
                        subject.model, part, eps=eps, norm="l2", steps=OUTSIDE_STEPS, spec=INPUT_SPECS["unit"]
                    )
                    for part in others.split(ATTACKED)
                ]
            )
            for eps in RADII
        }
        confidences = {radius: ask(subject.model, images).softmax(1).amax(1) for radius, images in radii.items()}
        outside[name] = {
            radius: {"auroc": measure_auroc(own, score), "confidence": score.mean().item()}
            for radius, score in confidences.items()
        }
    stand = attack(subject, x, y, *ATTACKS["l2_pgd20"])
    return {"outside": outside, "confidence": own.mean().item(), "l2_pgd20": count(stand, y, subject.n_classes)}


def draw_outside(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return images of no class, [N, C, H, W]: "digits", "noise", or "smooth", noise of 4 x 4 pixels made larger."""
    if name == "smooth":
        coarse = torch.rand(OUTSIDE, shape[0], 4, 4, generator=torch.Generator().manual_seed(1))
        return F.interpolate(coarse, size=shape[1:], mode="bilinear", align_corners=False)
    return OutsideStream(name, shape, INPUT_SPECS["unit"], seed=1).draw(OUTSIDE)


@torch.no_grad()
def ask_teacher(subject: Subject, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return how faithful a student is to the probe on the teacher's network, and what its neighbours answer."""
    teacher = find_probe(subject)
    own, theirs = encode(subject.model.algorithm.featurizer, x), encode(teacher.featurizer, x)
    answers, beliefs = ask(subject.model, x), ask(teacher.predict, x)
    fidelity = {
        "agreement": measure_agreement(answers, beliefs),
        "kl": measure_kl(answers, beliefs),
        "cka": measure_cka(own, theirs),
        "cosines": measure_cosine_correlation(own, theirs),
    }
    right = count(beliefs.argmax(1) == y, y, subject.n_classes)
    return {"knn": ask_neighbours(subject, x, y), "fidelity": fidelity, "teacher_clean": right}


def find_probe(subject: Subject) -> Any:
    """Return the linear probe of the same trial and held-out domain, whose frozen network's features are stored."""
    wanted = [subject.run.trial_seed, subject.held_out]
    for done in sorted(PROBES.glob(f"*/{DONE_FILE}")):
        args = read_first_record(done.parent)["args"]
        if [args["trial_seed"], args["test_envs"]] == wanted:
            path = done.parent / CHECKPOINT_FILE
            teacher = build_model(load_checkpoint(path), path, subject.host)
            freeze_all(teacher)
            teacher.to(subject.model.device)
            share_features(teacher, Path(args["feature_cache"]), print)
            return teacher
    raise RunError(f"no probe in {PROBES} of trial and domain {wanted}: run sweeps/related/tintem/sweep.yaml first")


@torch.no_grad()
def encode(featurizer: Any, x: Tensor) -> Tensor:
    """Return features, [N, D], after a layer norm, as TinTeM compares pooled ones."""
    features = torch.cat([featurizer(batch) for batch in x.split(BATCH)])
    return F.layer_norm(features, features.shape[1:])


def ask_neighbours(subject: Subject, x: Tensor, y: Tensor) -> float:
    """Return how often the nearest images of the training domains' in-splits name an image's class."""
    bank, featurizer = [], subject.model.algorithm.featurizer
    for i, name in enumerate(subject.environments):
        if i not in subject.held_out:
            positions = sorted(int(key) for key in subject.data.in_splits[i].keys)
            pixels, labels = subject.load(name, positions)
            bank.append((encode(featurizer, pixels), labels))
    features, labels = (torch.cat(parts) for parts in zip(*bank, strict=True))
    votes = vote_by_neighbours(encode(featurizer, x), features, labels, subject.n_classes)
    return (votes.argmax(1) == y).float().mean().item()


Question = Callable[[Subject, Tensor, Tensor], dict[str, Any]]
QUESTIONS: dict[str, tuple[Question, ...]] = {
    "at": (ask_pgd, ask_attacks),
    "bmtard": (ask_pgd,),
    "faal": (ask_pgd,),
    "piat": (ask_pgd,),
    "adt": (ask_pgd, ask_attacks),
    "oat": (ask_lambdas,),
    "ratio": (ask_outside,),
    "tintem": (ask_teacher,),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="its folder, or that of a sweep")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    for path in args.runs:
        for done in [path / DONE_FILE] if (path / RECORDS_FILE).is_file() else sorted(path.glob(f"*/{DONE_FILE}")):
            folder = done.parent.resolve()
            if not (folder / MEASURES_FILE).is_file():
                study = folder.parts[folder.parts.index("related") + 1]
                print(json.dumps(measure(folder, study, args.device)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
