"""Data sets that upstream alone has, from a few pictures in each one's own layout: our engine trains on them all."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.data.splits import build_data
from daft_domainbed.errors import UsageError
from daft_domainbed.host import contract
from daft_domainbed.models import weights
from daft_domainbed.teachers.provenance import describe

pytestmark = pytest.mark.usefixtures("upstream")

FOLDERS = {
    "VLCS": ("VLCS", ["Caltech101", "LabelMe", "SUN09", "VOC2007"]),
    "OfficeHome": ("office_home", ["Art", "Clipart", "Product", "Real World"]),
    "TerraIncognita": ("terra_incognita", ["location_100", "location_38", "location_43", "location_46"]),
    "DomainNet": ("domain_net", ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]),
    "SVIRO": (
        "sviro",
        ["aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"],
    ),
}
SPAWRIOUS = [f"Spawrious{kind}_{level}" for kind in ("O2O", "M2M") for level in ("easy", "medium", "hard")]
N_CLASSES = dict.fromkeys(FOLDERS, 2) | dict.fromkeys(SPAWRIOUS, 4) | {"WILDSCamelyon": 2, "WILDSFMoW": 62}

# Upstream's sets serve 224 x 224 pixels whatever the files hold; this looks at few of them.
SMALL = {"backbone": "shufflenet_v2_x0_5", "backbone_input_size": 32, "weights": "none", "batch_size": 2}
SMALL_TEACHER = {"teacher_backbone": "shufflenet_v2_x0_5", "teacher_input_size": 32, "teacher_weights": "none"}
FLAGS = {"host": "upstream", "steps": 3, "holdout_fraction": 0.5}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that holds every data set, four pictures a domain or so; not to be written to."""
    root = tmp_path_factory.mktemp("layouts")
    for folder, domains in FOLDERS.values():
        for domain, label, i in product(domains, ["cat", "dog"], range(2)):
            save_noise(root / folder / domain / label / f"{domain}_{i}.png")
    make_spawrious(root)
    make_camelyon(root / "camelyon17_v1.0")
    make_fmow(root / "fmow_v1.1")
    return str(root)


def make_spawrious(root: Path) -> None:
    locations = ["beach", "desert", "dirt", "jungle", "mountain", "snow"]
    for group, location, label in product("01", locations, ["bulldog", "corgi", "dachshund", "labrador"]):
        save_noise(root / group / location / label / f"{location}_{label}.png")


def make_camelyon(root: Path) -> None:
    names = ["patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split"]
    rows: list[list[Any]] = []
    for hospital, x in product(range(5), range(4)):
        patient = f"{20 * hospital:03}"
        save_noise(root / f"patches/patient_{patient}_node_0/patch_patient_{patient}_node_0_x_{x}_y_9.png")
        rows.append([len(rows), patient, 0, x, 9, x % 2, hospital, hospital, 0])
    write_table(root / "metadata.csv", ["", *names], rows)
    (root / "RELEASE_v1.0.txt").touch()


def make_fmow(root: Path) -> None:
    regions = {"CHN": "Asia", "FRA": "Europe", "KEN": "Africa", "BRA": "Americas", "AUS": "Oceania"}
    rows = [
        [split, category, country, f"{2002 + year}-07-01T12:00:00Z"]
        for year, (split, category) in enumerate(product(["train", "val"], ["airport", "zoo"]))
        for country in [*regions, "nowhere"]  # which is the sixth region
    ]
    for i in range(len(rows)):
        save_noise(root / f"images/rgb_img_{i}.png")
    write_table(root / "rgb_metadata.csv", ["split", "category", "country_code", "timestamp"], rows)
    write_table(root / "country_code_mapping.csv", ["alpha-3", "region"], regions.items())
    (root / "RELEASE_v1.1.txt").touch()


def save_noise(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(sum(map(ord, str(path.name))))
    Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


def write_table(path: Path, names: list[str], rows: Iterable[Iterable[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


@pytest.fixture
def train(tiny: Any, layouts: str) -> Callable[..., Path]:
    """Trains on one of them, into a folder below the test's own."""

    def run(folder: str, hparams: dict[str, Any] | None = None, **flags: Any) -> Path:
        small = SMALL | (SMALL_TEACHER if flags.get("algorithm") in ("AFT", "KD", "DAFT") else {})
        return Path(tiny.train(folder, small | (hparams or {}), **{**FLAGS, "data_dir": layouts, **flags}))

    return run


def fingerprint_all(dataset: str, root: str) -> dict[str, str]:
    host = contract.find_host("upstream")
    args = TrainArgs(dataset, holdout_fraction=0.5, steps=3, data_dir=root)
    data = build_data(host, args, {"data_augmentation": True}, contract.get_dataset_class(host, dataset))
    prints: dict[str, str] = describe(args, data.dataset.num_classes, (), data.list_splits())["fingerprints"]
    return prints


@pytest.mark.slow
@pytest.mark.parametrize("dataset", N_CLASSES)
def test_a_run_on_it_is_recorded_by_its_domains(
    train: Callable[..., Path], records: Callable[[Path], list[dict[str, Any]]], dataset: str
) -> None:
    folder = train("run", dataset=dataset, test_envs=[1])
    first, last = records(folder)
    environments = list(contract.describe_dataset(contract.find_host("upstream"), dataset, {}).environments)
    assert (first["step"], last["step"]) == (0, 2)
    assert first["environments"] == environments
    accuracies = {name for name in last if name.endswith("_acc")}
    assert accuracies == {f"env{i}_{part}_acc" for i in range(len(environments)) for part in ("in", "out")}
    content = weights.load(folder / "model.pkl")
    assert (content["model_num_classes"], content["model_num_domains"]) == (N_CLASSES[dataset], len(environments) - 1)
    assert len(set(content["provenance"]["fingerprints"].values())) == 2 * len(environments)


@pytest.mark.slow
def test_students_of_every_seed_share_a_teacher_that_was_made_for_them(
    train: Callable[..., Path], records: Callable[[Path], list[dict[str, Any]]]
) -> None:
    runs = {
        seed: train(f"daft{seed}", algorithm="DAFT", dataset="WILDSCamelyon", test_envs=[2], seed=seed)
        for seed in (0, 1)
    }
    taught = [records(folder)[0]["teacher"] for folder in runs.values()]
    assert taught[0]["sha256"] == taught[1]["sha256"]
    assert (taught[0]["algorithm"], taught[0]["teacher"]["algorithm"]) == ("AFT", "ERM")
    store = runs[0].parent / "teachers"
    assert sorted(path.name.partition("-")[0] for path in store.iterdir()) == ["AFT", "ERM"]


@pytest.mark.slow
def test_a_plain_checkpoint_teaches_only_who_holds_out_what_it_did(train: Callable[..., Path]) -> None:
    flags = {"dataset": "WILDSCamelyon", "test_envs": [2]}
    checkpoint = train("erm", **flags) / "model.pkl"
    content = weights.load(checkpoint)
    del content["provenance"]  # as DomainBed's own have none: it is worked out from the arguments
    torch.save(content, checkpoint)
    given = {"teacher": str(checkpoint)}
    assert (train("kd", given, algorithm="KD", **flags) / "done").is_file()
    with pytest.raises(UsageError, match=r"know the held-out domains: test_envs is \[2\] there and \[3\] here"):
        train("other", given, algorithm="KD", **flags | {"test_envs": [3]})


def test_a_changed_label_changes_the_fingerprint_of_its_domain(layouts: str, tmp_path: Path) -> None:
    shutil.copytree(Path(layouts, "camelyon17_v1.0"), tmp_path / "camelyon17_v1.0")
    before = fingerprint_all("WILDSCamelyon", str(tmp_path))
    assert before == fingerprint_all("WILDSCamelyon", layouts)
    table = tmp_path / "camelyon17_v1.0/metadata.csv"
    *others, last = table.read_text().splitlines()
    table.write_text("\n".join([*others, last.replace(",1,4,4,0", ",0,4,4,0")]) + "\n")
    after = fingerprint_all("WILDSCamelyon", str(tmp_path))
    changed = [name for name in before if before[name] != after[name]]
    assert changed in (["env4_in"], ["env4_out"])


def test_another_picture_changes_the_fingerprint_of_its_domains(layouts: str, tmp_path: Path) -> None:
    for group in "01":
        shutil.copytree(Path(layouts, group), tmp_path / group)
    before = fingerprint_all("SpawriousO2O_easy", str(tmp_path))
    assert before == fingerprint_all("SpawriousO2O_easy", layouts)
    picture = tmp_path / "0/desert/bulldog/desert_bulldog.png"
    picture.rename(picture.with_name("another.png"))
    after = fingerprint_all("SpawriousO2O_easy", str(tmp_path))
    changed = [name for name in before if before[name] != after[name]]
    assert changed in (["env1_in"], ["env1_out"])  # desert's bulldogs are the first training domain's


@pytest.mark.parametrize("dataset", ["VLCS", "WILDSCamelyon", "SpawriousM2M_hard"])
def test_missing_files_are_answered_with_the_place(train: Callable[..., Path], tmp_path: Path, dataset: str) -> None:
    with pytest.raises(UsageError, match=f"{dataset} cannot be read from --data_dir {tmp_path}"):
        train("run", dataset=dataset, data_dir=str(tmp_path))
    with pytest.raises(UsageError, match=f"{dataset} is read from files: say where with --data_dir"):
        train("run", dataset=dataset, data_dir=None)
