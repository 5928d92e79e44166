"""The sweeps in this repository: their files hold flags, and their pages say how many jobs come of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from daft_domainbed.embedded import datasets
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.sweep import collect_sweep_args
from daft_domainbed.scripts.sweep import read_config

SWEEPS = Path(__file__).parents[2] / "sweeps"
IMAGE_SETS = ("VLCS", "PACS", "OfficeHome", "TerraIncognita", "DomainNet")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every data set in its layout, as small as its batch allows."""
    root = tmp_path_factory.mktemp("data")
    picture = root / "picture.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    for name in IMAGE_SETS:
        dataset: Any = getattr(datasets, name)
        for domain in dataset.ENVIRONMENTS:
            folder = root / dataset.FOLDER / domain / "dog"
            folder.mkdir(parents=True)
            for i in range(80):
                (folder / f"{i}.png").hardlink_to(picture)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6000), ("t10k", 1000)):
        images = np.array([2051, count, 28, 28], ">i4").tobytes() + bytes(count * 28 * 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + bytes(count))
    return root


@pytest.mark.parametrize("study", sorted(path.parent.name for path in SWEEPS.glob("*/sweep.yaml")))
def test_page_says_how_many_jobs_there_are(study: str, data_dir: Path) -> None:
    given = read_config(SWEEPS / study / "sweep.yaml", "launch")
    jobs = make_plan(collect_sweep_args(given | {"data_dir": str(data_dir)}))
    stages = Counter(job.stage for job in jobs)
    page = " ".join((SWEEPS / study / "README.md").read_text().split())
    said = re.search(r"([\d,]+) jobs: ([\d,]+) ERM teachers, ([\d,]+) AFT teachers, ([\d,]+) students", page)
    assert said is not None
    numbers = [int(text.replace(",", "")) for text in said.groups()]
    assert numbers == [len(jobs), stages["erm_teacher"], stages["aft_teacher"], stages["student"]]
    assert f"--config sweeps/{study}/sweep.yaml" in page


@pytest.mark.parametrize("file", sorted((SWEEPS / "rich_teachers").glob("*.yaml")), ids=lambda file: file.stem)
def test_rich_teachers_have_as_many_jobs_as_their_page_says(file: Path, data_dir: Path) -> None:
    jobs = make_plan(collect_sweep_args(read_config(file, "launch") | {"data_dir": str(data_dir)}))
    assert Counter(job.stage for job in jobs) == {"erm_teacher": 12, "aft_teacher": 12, "student": 36}
    assert "60 jobs: 12 ERM teachers, 12 AFT teachers, 36 students" in (file.parent / "README.md").read_text()
    assert file.stem in str(read_config(file, "launch")["output_dir"])


CLAIM = sorted((SWEEPS / "claim").glob("*/*.yaml"))


@pytest.mark.parametrize("file", CLAIM, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_sweeps_of_the_claim_study(file: Path, data_dir: Path) -> None:
    given = read_config(file, "launch")
    jobs = make_plan(collect_sweep_args(given | {"data_dir": str(data_dir)}))
    trials = {job.args.trial_seed for job in jobs}
    students = [job for job in jobs if job.stage == "student"]
    n_envs = len({tuple(job.args.test_envs) for job in students})
    assert len(students) == len(given["algorithms"]) * len(trials) * n_envs
    assert min(trials) == (100 if file.parent.name == "development" else 0)
    assert given["output_dir"] == f"runs/claim/{file.parent.name}/{file.stem}"
    assert given["teachers_dir"] == "runs/claim/teachers"


def test_sweeps_of_the_claim_study_differ_in_what_they_compare() -> None:
    report = [read_config(file, "launch") for file in CLAIM if file.parent.name == "report"]
    sweeps = [(*given["algorithms"], *given["datasets"], given["hparams"], given["precision"]) for given in report]
    assert len({*sweeps}) == len(sweeps) > 10
    assert {given["precision"] for given in report} == {"bf16", "fp32"}
    pretrained = {given["precision"] for given in report if "lite0" in given["hparams"]}
    assert len(pretrained) == 1


PRETRAINED = sorted((SWEEPS / "claim" / "pretrained").glob("*/*.yaml"))
# What may differ between arms; all else is one setting.
ARMS = {"kd_match", "aft_attack", "aft_eps", "aft_scope", "average_start", "backbone", "backbone_input_size"}
ARMS |= {"backbone_frozen", "teacher_backbone", "teacher_frozen", "freeze_bn"}


@pytest.mark.parametrize("file", PRETRAINED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_sweeps_of_the_study_of_pretrained_students(file: Path) -> None:
    given, part = read_config(file, "launch"), file.parent.name
    first, end = given.get("n_trials_from", 0), given["n_trials"]
    assert (first, end) == (102, 105) if part == "development" else (first, end) in {(0, 24), (0, 12), (0, 8)}
    assert given["output_dir"] == f"runs/claim/pretrained/{part}/{file.stem}"
    assert given["steps"] % given["checkpoint_freq"] == 0 and given["steps"] // given["checkpoint_freq"] == 3
    (algorithm,) = given["algorithms"]
    assert algorithm == file.stem.removeprefix("screen_").split("_")[0].upper()


def test_arms_of_the_study_of_pretrained_students_differ_in_nothing_else() -> None:
    arms = {file.stem: read_config(file, "launch") for file in PRETRAINED if file.parent.name == "report"}
    assert {name for name, given in arms.items() if given["n_trials"] == 24} == {"erm", "kd", "kd_matched", "daft"}
    daft = json.loads(arms["daft"]["hparams"])
    for given in arms.values():
        own = json.loads(given["hparams"])
        assert all(own[name] == daft[name] for name in own.keys() & daft.keys() - ARMS)
        assert own.keys() - daft.keys() <= {"kd_match"}
    matched = json.loads(arms["kd_matched"]["hparams"])
    assert matched == daft | {"kd_match": True}
    assert json.loads(arms["kd"]["hparams"]).items() < daft.items()
