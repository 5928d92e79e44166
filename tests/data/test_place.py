"""Folders of images are known by their files, wherever they lie: which data is it, in runs, sweeps and tables?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.arguments import SweepArgs
from daft_domainbed.cli import run_command
from daft_domainbed.data.place import identify, settle_data
from daft_domainbed.errors import UsageError
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.plan_file import read_begun_data, read_jobs
from tests.conftest import FOLDER_HPARAMS
from tests.launch.conftest import run_here
from tests.states import preserving

TINY = json.dumps(FOLDER_HPARAMS | {"backbone": "resnet8_w2", "teacher_backbone": "resnet8_w2"})
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def birds(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images in the working folder, `v1/birds`, and another one of that name, `v2/birds`."""
    root = image_folder.parent
    for version in ("v1", "v2"):
        shutil.copytree(image_folder, root / version / "birds")
    for picture in (root / "v2" / "birds").rglob("*.png"):
        picture.rename(picture.with_stem(f"{picture.stem}_2"))
    monkeypatch.chdir(root)
    return root


def sweep(*names: str, **flags: Any) -> SweepArgs:
    return SweepArgs(datasets=list(names), algorithms=["ERM"], output_dir="sweep", hparams=TINY, **flags)


def test_the_place_does_not_count_but_names_and_sizes_do(birds: Path) -> None:
    one = identify("folder:v1/birds")
    assert identify(f"folder:{birds / 'v1' / 'birds'}/") == one
    shutil.move("v1/birds", "fowl")
    assert identify("folder:fowl") == one
    assert identify("folder:v2/birds") != one
    picture = next(Path("fowl").rglob("*.png"))
    picture.write_bytes(picture.read_bytes() + b"\0")
    assert identify("folder:fowl") != one


def test_a_folder_that_is_named_twice_is_one_data_set(birds: Path) -> None:
    settled = settle_data(sweep("folder:v1/birds", "Debug28", "folder:v1/birds/", "folder:v2/birds", "Debug28"), {})
    assert settled.datasets == ["folder:v1/birds", "Debug28", "folder:v2/birds"]
    assert [settled.data[name]["data_path"] for name in settled.datasets[::2]] == [
        f"{birds}/v1/birds", f"{birds}/v2/birds"
    ]  # fmt: skip


def test_what_a_sweep_was_begun_with_is_found_again(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = settle_data(sweep("folder:v1/birds"), {}).data
    stored = replace(sweep("folder:v1/birds"), data=begun)
    monkeypatch.chdir("/")
    assert settle_data(stored, begun).data == begun  # from any folder
    shutil.move(birds / "v1" / "birds", birds / "fowl")
    with pytest.raises(UsageError, match=r"the data of folder:v1/birds are not those .*there is no .*--data_dir or"):
        settle_data(stored, begun)
    moved = {"folder:v1/birds": begun["folder:v1/birds"] | {"data_path": f"{birds}/fowl"}}
    assert settle_data(replace(stored, data_dir=str(birds / "fowl")), begun).data == moved
    told = settle_data(sweep(f"folder:{birds}/fowl"), begun)
    assert (told.datasets, told.data) == (["folder:v1/birds"], moved)


def test_other_data_of_one_name_are_another_data_set(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("v1")
    begun = settle_data(sweep("folder:birds"), {}).data
    monkeypatch.chdir(birds / "v2")
    assert settle_data(sweep("folder:birds"), begun).datasets == [f"folder:{birds}/v2/birds"]
    assert settle_data(replace(sweep("folder:birds"), data=begun), begun).data == begun
    monkeypatch.chdir(birds / "v1")
    next(Path("birds").rglob("*.png")).unlink()
    with pytest.raises(UsageError, match="holds other files"):
        settle_data(sweep("folder:birds"), begun)


def test_an_older_sweep_goes_on_by_name(birds: Path) -> None:
    begun = {"folder:v1/birds": {"data_id": None, "data_path": None}}
    place = settle_data(sweep("folder:v1/birds"), begun).data["folder:v1/birds"]
    assert place == {"data_id": None, "data_path": f"{birds}/v1/birds"}


def test_two_data_sets_of_one_name_have_teachers_of_their_own(birds: Path) -> None:
    jobs = make_plan(replace(sweep("folder:v1/birds", "folder:v2/birds", n_trials=1, n_hparams=1), algorithms=["KD"]))
    folders = {name: {job.folder for job in jobs if job.args.dataset == name} for name in sweep_names(jobs)}
    assert len(folders) == 2
    assert not set.intersection(*folders.values())


def sweep_names(jobs: list[Any]) -> set[str]:
    return {job.args.dataset for job in jobs}


@pytest.fixture
def command(birds: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs a command in this process; returns its exit status and what it printed, errors last."""
    from daft_domainbed.launch import launchers

    monkeypatch.setitem(launchers._BUILT_IN, "local", lambda: run_here)

    def run(name: str, *argv: str) -> tuple[int, str]:
        capfd.readouterr()
        status = run_command(name, list(argv))
        out, err = capfd.readouterr()
        return status, out + err

    with preserving():
        yield run


ERM = json.dumps(FOLDER_HPARAMS | {"backbone": "resnet8_w2"})
TRAIN = ("--algorithm", "ERM", "--steps", "2", "--hparams", ERM, "--device", "cpu")
LAUNCH = ("launch", "--algorithms", "ERM", "KD", "--n_trials", "1", "--n_hparams", "1", "--single_test_envs")
LAUNCH += ("--steps", "2", "--hparams", TINY, "--device", "cpu", "--skip_confirmation", "--output_dir", "sweep")


def test_a_finished_run_is_not_another_data_sets(command: Callable[..., tuple[int, str]]) -> None:
    assert command("train", *TRAIN, "--dataset", "folder:v1/birds", "--output_dir", "run")[0] == 0
    status, said = command("train", *TRAIN, "--dataset", "folder:v2/birds", "--output_dir", "run")
    assert (status, len(said.splitlines())) == (2, 1)
    assert "dataset is folder:v1/birds there and folder:v2/birds here, with other files" in said
    shutil.move("v1/birds", "fowl")
    status, said = command("train", *TRAIN, "--dataset", "folder:fowl", "--output_dir", "run")
    assert (status, said) == (0, "run is done already, with the same data and arguments\n")


def test_a_sweep_goes_on_from_anywhere_and_tells_names_apart(
    command: Callable[..., tuple[int, str]], birds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("sweep", *LAUNCH, "--datasets", "folder:v1/birds", "folder:v2/birds")[0] == 0
    before = json.loads(command("collect_results", "--input_dir", "sweep", "--format", "json")[1])
    assert [table["dataset"] for table in before["tables"][::3]] == ["folder:v1/birds", "folder:v2/birds"]
    jobs = read_jobs(Path("sweep"))
    shutil.rmtree(Path("sweep", jobs[-1].folder))
    Path("sweep").rename("moved")
    monkeypatch.chdir("/")
    root = str(birds / "moved")
    assert command("sweep", "launch", "--output_dir", root, "--skip_confirmation")[0] == 0
    assert json.loads(command("collect_results", "--input_dir", root, "--format", "json")[1]) == before
    # Where the data are gone, all that needs none goes on, and a launch says what to do.
    (birds / "v2" / "birds").rename(birds / "fowl")
    shutil.rmtree(Path(root, jobs[-1].folder))
    status, said = command("sweep", "launch", "--output_dir", root, "--skip_confirmation")
    assert (status, len(said.splitlines())) == (2, 1)
    assert "--data_dir or --datasets folder:NEW" in said
    assert command("collect_results", "--input_dir", root)[0] == 0
    assert command("sweep", "status", "--output_dir", root)[0] == 0
    fowl = ("--datasets", f"folder:{birds}/fowl")
    assert command("sweep", "launch", "--output_dir", root, "--skip_confirmation", *fowl)[0] == 0
    assert json.loads(command("collect_results", "--input_dir", root, "--format", "json")[1]) == before
    assert read_begun_data(Path(root))["folder:v2/birds"]["data_path"] == f"{birds}/fowl"


def test_run_keeps_data_sets_of_one_name_apart(command: Callable[..., tuple[int, str]]) -> None:
    flags = ("--algorithms", "ERM", "--steps", "2", "--hparams", ERM, "--device", "cpu")
    for version in ("v1", "v2", "v1"):
        assert command("run", "--dataset", f"folder:{version}/birds", *flags)[0] == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["birds", f"birds-{identify('folder:v2/birds')[:8]}"]


def test_relative_paths_in_hyperparameters_count_from_where_a_sweep_was_begun(
    command: Callable[..., tuple[int, str]], birds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for env in "012":
        erm = ("--test_envs", env, "--output_dir", f"erm/{env}")
        assert command("train", *TRAIN, "--dataset", "folder:v1/birds", *erm)[0] == 0
    named = json.dumps(FOLDER_HPARAMS | {"backbone": "resnet8_w2", "teacher": "erm"})
    flags = ("--datasets", "folder:v1/birds", "--algorithms", "KD", "--hparams", named)
    assert command("sweep", *LAUNCH, *flags)[0] == 0
    shutil.rmtree(Path("sweep", read_jobs(Path("sweep"))[0].folder))
    monkeypatch.chdir("/")
    status, said = command("sweep", "launch", "--output_dir", str(birds / "sweep"), "--skip_confirmation")
    assert status == 0, said


def test_a_teacher_of_before_files_counted_in_its_name_is_found(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:

    kd = ("train", *TRAIN, "--hparams", TINY, "--dataset", "folder:v1/birds", "--algorithm", "KD")
    with monkeypatch.context() as patch:
        patch.setattr("daft_domainbed.data.place.locate", lambda args: args)
        assert command(*kd, "--output_dir", "old")[0] == 0
    (teacher,) = Path("teachers").iterdir()
    assert command(*kd, "--output_dir", "new")[0] == 0
    assert list(Path("teachers").iterdir()) == [teacher]
    assert command(*kd[:-4], "--dataset", "folder:v2/birds", "--algorithm", "KD", "--output_dir", "other")[0] == 0
    assert len(list(Path("teachers").iterdir())) == 2
