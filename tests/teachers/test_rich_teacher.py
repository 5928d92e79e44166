"""Teachers of several networks, of a fine-tuned suffix, and of a probe that is fine-tuned afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from daft_domainbed.models.weights import load

RICH = {"teacher_backbone": ["resnet8_w2", "resnet8_w3"], "teacher_input_size": ["auto", "auto"]}


def find_teacher(student: Path, kind: str) -> dict[str, Any]:
    (folder,) = (student.parent / "teachers").glob(f"{kind}-*")
    return load(folder / "model.pkl")


@pytest.mark.parametrize("frozen", [True, "stages:2", False])
def test_a_student_of_several_networks(tiny: Any, frozen: bool | str) -> None:
    hparams = {**RICH, "teacher_frozen": frozen, "aft_attack": "features"}
    student = tiny.train("student", hparams, algorithm="DAFT", steps=4)
    erm, aft = find_teacher(student, "ERM"), find_teacher(student, "AFT")
    assert erm["model_hparams"]["backbone"] == aft["model_hparams"]["backbone"] == RICH["teacher_backbone"]
    features = [name for name in erm["model_dict"] if "parts" in name]
    assert features
    assert all(torch.equal(erm["model_dict"][name], aft["model_dict"][name]) for name in features)
    assert not torch.equal(erm["model_dict"]["classifier.weight"], aft["model_dict"]["classifier.weight"])
    assert erm["model_dict"]["classifier.weight"].shape[1] == 4 * (2 + 3)


def test_adversarial_fine_tuning_of_all_keeps_the_frozen_prefix(tiny: Any) -> None:
    hparams = {"teacher_frozen": "stages:2", "aft_scope": "all"}
    student = tiny.train("student", hparams, algorithm="DAFT", steps=4)
    erm, aft = find_teacher(student, "ERM")["model_dict"], find_teacher(student, "AFT")
    assert aft["model_hparams"]["backbone_frozen"] == "stages:2"
    changed = {name for name, value in aft["model_dict"].items() if not torch.equal(value, erm[name])}
    assert "featurizer.blocks.2.conv1.weight" in changed
    assert not any(name.startswith(("featurizer.conv", "featurizer.bn", "featurizer.blocks.1")) for name in changed)


def test_probe_then_fine_tune_is_another_teacher(tiny: Any) -> None:
    names = []
    for hparams in ({}, {"teacher_probe_steps": 2}):
        student = tiny.train(f"{len(hparams)}/student", hparams, algorithm="KD", steps=4)
        (teacher,) = (student.parent / "teachers").iterdir()
        names.append(teacher.name)
        given = json.loads((teacher / "results.jsonl").read_text().splitlines()[0])["hparams"]
        assert given.get("probe_steps", 0) == hparams.get("teacher_probe_steps", 0)
    assert names[0] != names[1]


def test_what_a_student_counts_in_its_own_steps_is_not_its_teachers(tiny: Any) -> None:
    plain = tiny.train("plain/student", algorithm="KD", steps=4)
    averaged = tiny.train("averaged/student", {"average_start": 2, "probe_steps": 1}, algorithm="KD", steps=4)
    stores = [[path.name for path in (run.parent / "teachers").iterdir()] for run in (plain, averaged)]
    assert stores[0] == stores[1]
