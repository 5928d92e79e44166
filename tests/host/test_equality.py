"""DomainBed's own loop, our engine over DomainBed's parts, and our engine over the embedded host: the same numbers.

The first is a process of its own, `python -m domainbed.scripts.train` with its eight loader workers a loader, inside
the clone; the other two start no worker. Records and final weights have to agree to the last bit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.models import weights
from daft_domainbed.training.engine import train

pytestmark = pytest.mark.usefixtures("upstream")  # which takes back what our engine registers

# What a clock says, and what only one of the two loops writes.
APART = {"step_time", "args", "hparams", "environments", "machine", "started", "seconds", "size", "teacher", "teachers"}

# DomainBed's script with what is ours, and without downloads: both sides start from the same random weights.
RUNNER = """
import sys, timm, torchvision
for name in ("resnet18", "resnet50"):
    setattr(torchvision.models, name, lambda build=getattr(torchvision.models, name), **_: build())
timm.create_model = lambda name, create=timm.create_model, **_: create(name)
from daft_domainbed.scripts.host import main
main(["domainbed.scripts.train", *sys.argv[1:]])
"""


@dataclass(frozen=True)
class Case:
    """One training run, for every loop."""

    name: str
    args: dict[str, Any]
    hparams: dict[str, Any] = field(default_factory=dict)
    hosts: tuple[str, ...] = ("upstream", "embedded")
    needs_runner: bool = False  # DomainBed's module alone could not run it here


COMMON = {"steps": 20, "checkpoint_freq": 8, "seed": 5, "trial_seed": 1}
SMALL = {"batch_size": 8}
RESNET18 = {"resnet18": True, "resnet50_augmix": False, "batch_size": 2}
ADAPTATION = {"task": "domain_adaptation", "uda_holdout_fraction": 0.4}
PAST_EVERY_WORKER = {"steps": 10, "checkpoint_freq": 9}

CASES = [
    Case("rotated", {"dataset": "RotatedMNIST", "test_envs": [1]}, SMALL),
    Case(
        "colored-pair-draw-adaptation",
        {"dataset": "ColoredMNIST", "test_envs": [2, 0], "hparams_seed": 3, **ADAPTATION},
        SMALL,
    ),
    Case(
        "balanced-dann-adaptation",
        {"dataset": "Debug28", "algorithm": "DANN", "test_envs": [2], **ADAPTATION},
        SMALL | {"class_balanced": True},
        hosts=("upstream",),
    ),
    Case("pacs", {"dataset": "PACS", "test_envs": [3], **PAST_EVERY_WORKER}, RESNET18, needs_runner=True),
    Case(
        "pacs-pair-balanced-uda",
        {"dataset": "PACS", "test_envs": [0, 2], "uda_holdout_fraction": 0.5, **PAST_EVERY_WORKER},
        RESNET18 | {"class_balanced": True},
        needs_runner=True,
    ),
    Case("emoji", {"dataset": "EmojiStyles", "test_envs": [3]}, {"backbone": "resnet8_w2"}, needs_runner=True),
    Case("documents", {"dataset": "DocRanking", "test_envs": [3]}, {"backbone": "ranker_w8"}, needs_runner=True),
    Case(
        "piat",
        {"dataset": "DocRanking", "test_envs": [3], "algorithm": "PIAT"},
        {"backbone": "ranker_w8", "natural": "ranker", "piat_static": True},
        needs_runner=True,
    ),
    Case(
        "piat_images",
        {"dataset": "EmojiStyles", "test_envs": [3], "algorithm": "PIAT"},
        {"backbone": "resnet8_w2", "natural": "ERM", "piat_static": True, "piat_steps": 2},
        needs_runner=True,
    ),
    Case(
        "sma",
        {"dataset": "EmojiStyles", "test_envs": [3], "algorithm": "SMA"},
        {"backbone": "resnet8_w2", "sma_start": 1},
        needs_runner=True,
    ),
    *(
        Case(
            name.lower(),
            {"dataset": "EmojiStyles", "test_envs": [3], "algorithm": name, "steps": 4, "checkpoint_freq": 3},
            {"batch_size": 8} | hparams,
            needs_runner=True,
        )
        for name, hparams in {
            "AT": {"backbone": "resnet8_w2", "at_steps": 2},
            "TinTeM": {
                "backbone": "resnet8_w2",
                "teacher_backbone": "resnet8_w4",
                "teacher_weights": "none",
                "teacher_input_size": 32,
            },
            "BMTARD": {"backbone": "resnet8_w2", "clean_teacher": "ERM", "robust_teacher": "AT", "at_steps": 2},
            "CLIP": {"backbone": "open_clip/small"},
            "CaRot": {"teacher": "CLIP"},
            "FAAL": {"teacher": "AT", "at_steps": 2, "faal_awp": 0.01},
            "OAT": {"backbone": "resnet8_w2", "at_steps": 2},
            "RATIO": {"backbone": "resnet8_w2", "ratio_steps": 2, "ratio_outside_steps": 2},
            "ADT": {"backbone": "resnet8_w2", "adt_steps": 2, "adt_samples": 2},
        }.items()
    ),
    # Each "teacher" is the checkpoint of that algorithm's `teachers` below.
    Case(
        "kd",
        {"dataset": "EmojiStyles", "test_envs": [3], "algorithm": "KD"},
        {"backbone": "resnet8_w2", "teacher": "ERM"},
        needs_runner=True,
    ),
    Case(
        "daft",
        {"dataset": "EmojiStyles", "test_envs": [3], "algorithm": "DAFT"},
        {"backbone": "resnet8_w2", "teacher": "AFT"},
        needs_runner=True,
    ),
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints of each kind on EmojiStyles, the last domain held out, as COMMON has it."""
    root = tmp_path_factory.mktemp("teachers")
    paths: dict[str, str] = {}
    robust, texts = {"backbone": "resnet8_w2", "at_steps": 2}, {"backbone": "open_clip/small", "batch_size": 8}
    kinds = (("ERM", {"backbone": "resnet8_w4"}), ("AFT", {}), ("AT", robust), ("CLIP", texts))
    kinds += (("ranker", {"backbone": "ranker_w8"}),)
    for name, hparams in kinds:
        if name == "AFT":
            hparams["teacher"] = paths["ERM"]
        task = {"dataset": "DocRanking", "algorithm": "ERM"} if name == "ranker" else {"algorithm": name}
        flags = COMMON | {"dataset": "EmojiStyles", "test_envs": [3], "steps": 2} | task
        args = TrainArgs(**flags, hparams=json.dumps(hparams), device="cpu", output_dir=str(root / name))
        paths[name] = str(train(args, quiet=True) / "model.pkl")
    return paths


def test_debug_run_is_equal(clone: str, data_dir: str, tmp_path: Path) -> None:
    check(Case("debug", {"dataset": "Debug28"}, SMALL), clone, data_dir, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_run_is_equal(
    case: Case,
    clone: str,
    data_dir: str,
    teachers: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = {name: teachers[kind] for name, kind in case.hparams.items() if name.endswith(("teacher", "natural"))}
    case = replace(case, hparams=case.hparams | named)
    build = torchvision.models.resnet18
    monkeypatch.setattr(torchvision.models, "resnet18", lambda **_: build())
    check(case, clone, data_dir, tmp_path)


def check(case: Case, clone: str, data_dir: str, folder: Path) -> None:
    args = COMMON | {"data_dir": data_dir} | case.args
    args["hparams"] = json.dumps(case.hparams)
    with start_upstream(args, folder / "theirs", clone, needs_runner=case.needs_runner) as process:
        for host in case.hosts:
            train(TrainArgs(**args, host=host, device="cpu", output_dir=str(folder / host)), quiet=True)
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    for host in case.hosts:
        assert_same_run(folder / host, folder / "theirs")


def start_upstream(args: dict[str, Any], folder: Path, clone: str, *, needs_runner: bool) -> subprocess.Popen[str]:
    command = [sys.executable, *(["-c", RUNNER] if needs_runner else ["-m", "domainbed.scripts.train"])]
    for name, value in args.items():
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    ours = str(Path(weights.__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([clone, ours]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DOMAINBED_ROOT": clone,
    }
    return subprocess.Popen(
        [*command, "--output_dir", str(folder)],
        cwd=clone,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_same_run(ours: Path, theirs: Path) -> None:
    for our, their in zip(read_records(ours), read_records(theirs), strict=True):
        # Of lists our loop measures more than accuracy.
        our = {k: v for k, v in our.items() if not re.fullmatch(r"env\d+_in_(?!acc).*", k)}
        assert {k: v for k, v in our.items() if k not in APART} == {k: v for k, v in their.items() if k not in APART}
        assert their["hparams"].items() <= our["hparams"].items()
    our_model, their_model = (weights.load(folder / "model.pkl") for folder in (ours, theirs))
    our_weights, their_weights = our_model["model_dict"], their_model["model_dict"]
    assert our_weights.keys() == their_weights.keys()
    assert [name for name in our_weights if not torch.equal(our_weights[name], their_weights[name])] == []


def read_records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
