"""What was begun goes on: a new argument, or a new hyperparameter, at its default makes nothing another run."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import PIL.features
import pytest
from torchvision.datasets import ImageFolder

from daft_domainbed import plugin
from daft_domainbed.algorithms.aft import AFT
from daft_domainbed.algorithms.daft import DAFT, KD
from daft_domainbed.arguments import SweepArgs, TrainArgs, get_identity, list_differences
from daft_domainbed.data import image_cache
from daft_domainbed.embedded.datasets import read_image
from daft_domainbed.errors import UsageError
from daft_domainbed.host import contract
from daft_domainbed.hparams import Hparam, number
from daft_domainbed.launch import plan
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.plan_file import check_plan, read_jobs, read_sweep_args, write_plan
from daft_domainbed.plugin.defaults import list_plain_pairs
from daft_domainbed.scripts import collect_results
from daft_domainbed.training.engine import train
from tests.conftest import read_records

BEGUN = Path(__file__).with_name("data_06410da") / "begun.tar.xz"


@dataclass(frozen=True)
class NewerTrainArgs(TrainArgs):
    flavour: str = "plain"


@dataclass(frozen=True, kw_only=True)
class NewerSweepArgs(SweepArgs):
    flavour: str = "plain"


@pytest.fixture(autouse=True)
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What commit 06410da left in the working folder; see the README beside it."""
    with tarfile.open(BEGUN) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plugin.unregister(contract.find_host())


@pytest.fixture
def newer_hparams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hyperparameter more of KD, DAFT and AFT each, as one that comes after its method has to be."""
    for kind, names in ((KD, ["kd_newer"]), (DAFT, ["kd_newer"]), (AFT, ["aft_newer"])):
        for name in names:
            monkeypatch.setitem(kind.HPARAMS, name, Hparam(1.0, number(0), "a later one", is_optional=True))
    list_plain_pairs.cache_clear()
    yield
    list_plain_pairs.cache_clear()


def read_asked(**changes: Any) -> SweepArgs:
    return SweepArgs(**read_sweep_args(Path("sweep")) | {"output_dir": "sweep"} | changes)


def name_jobs(jobs: list[Job]) -> list[list[Any]]:
    return [[job.stage, job.folder, job.needs] for job in jobs]


def list_folders(**given: float) -> dict[str, set[str]]:
    """Return the folders of a plan of then with hyperparameters more, by algorithm; teachers but ERM apart."""
    folders: dict[str, set[str]] = {}
    for job in make_plan(read_asked(hparams=json.dumps(json.loads(read_asked().hparams or "{}") | given))):
        if job.stage != "erm_teacher":
            name = job.args.algorithm if job.stage == "student" else f"{job.args.algorithm} teacher"
            folders.setdefault(name, set()).add(job.folder)
    return folders


def read_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def find_job(algorithm: str) -> Job:
    """Return a run with default hyperparameters that holds out the first domain."""
    jobs = (job for job in read_jobs(Path("sweep")) if job.stage == "student" and job.args.algorithm == algorithm)
    return next(job for job in jobs if job.args.hparams_seed == 0 and job.args.test_envs == [0])


class TestPlans:
    def test_of_then_are_made_again(self) -> None:
        assert name_jobs(make_plan(read_asked())) == name_jobs(read_jobs(Path("sweep")))

    def test_of_then_are_gone_on_with(self) -> None:
        check_plan(read_asked())
        write_plan(read_asked(), make_plan(read_asked()))
        assert name_jobs(read_jobs(Path("sweep"))) == name_jobs(make_plan(read_asked()))

    def test_of_then_may_grow_and_do_not_become_others(self) -> None:
        check_plan(read_asked(n_hparams=3))
        with pytest.raises(UsageError, match="holds a sweep with other arguments .steps is 4 there and 5 here"):
            check_plan(read_asked(steps=5))

    @pytest.mark.parametrize("newer", [False, True])
    @pytest.mark.parametrize("number", range(3))
    def test_of_all_kinds_name_what_they_named(self, number: int, newer: bool, request: pytest.FixtureRequest) -> None:
        if newer:
            request.getfixturevalue("newer_hparams")
        pinned = json.loads(Path("plans.json").read_text())[number]
        begun = {folder for _, folder, _ in pinned["jobs"]}  # a draw that the data cannot serve was planned then
        jobs = make_plan(SweepArgs(**pinned["asked"], output_dir="elsewhere"), begun=begun)
        assert name_jobs(jobs) == pinned["jobs"]


class TestNewArgument:
    def test_at_its_default_makes_no_other_plan(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan, "TrainArgs", NewerTrainArgs)
        asked = NewerSweepArgs(**vars(read_asked()))
        check_plan(asked)
        jobs = make_plan(asked)
        assert {type(job.args) for job in jobs} == {NewerTrainArgs}
        assert name_jobs(jobs) == name_jobs(read_jobs(Path("sweep")))

    def test_counts_where_it_is_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def make_sweet(**values: Any) -> NewerTrainArgs:
            return NewerTrainArgs(**values, flavour="sweet")

        monkeypatch.setattr(plan, "TrainArgs", make_sweet)
        old = {job.folder for job in read_jobs(Path("sweep")) if job.stage == "student"}
        assert not old & {job.folder for job in make_plan(read_asked())}
        with pytest.raises(UsageError, match="flavour is plain there and sweet here"):
            check_plan(NewerSweepArgs(**vars(read_asked()), flavour="sweet"))

    def test_at_its_default_is_no_difference(self) -> None:
        args = find_job("KD").args
        stored = read_records(Path(args.output_dir))[0]["args"]
        newer = NewerTrainArgs(**vars(args))
        assert get_identity(newer) == get_identity(args)
        assert list_differences(stored, newer) == []
        assert list_differences(stored, replace(newer, flavour="sweet")) == ["flavour is plain there and sweet here"]

    def test_at_its_default_finds_the_finished_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        args = find_job("KD").args
        before = (Path(args.output_dir) / "results.jsonl").read_bytes()
        train(NewerTrainArgs(**vars(args)), quiet=True)
        assert (Path(args.output_dir) / "results.jsonl").read_bytes() == before
        with pytest.raises(UsageError, match="holds a finished run with other arguments .flavour is plain there and s"):
            train(NewerTrainArgs(**vars(args), flavour="sweet"), quiet=True)


@pytest.mark.usefixtures("newer_hparams")
class TestNewHyperparameter:
    def test_at_its_default_makes_no_other_plan(self) -> None:
        assert name_jobs(make_plan(read_asked())) == name_jobs(read_jobs(Path("sweep")))

    def test_counts_where_it_is_given(self) -> None:
        plain, of_kd, of_aft = (list_folders(**given) for given in ({}, {"kd_newer": 0.5}, {"aft_newer": 0.5}))
        is_kept = {name: plain[name] == of_kd[name] for name in plain}
        assert is_kept == {"ERM": True, "SMA": True, "AFT": True, "KD": False, "DAFT": False, "AFT teacher": True}
        assert not plain["AFT teacher"] & of_aft["AFT teacher"]
        assert plain["KD"] == of_aft["KD"]
        assert plain["AFT teacher"] == list_folders(aft_newer=1.0)["AFT teacher"]  # its default, spelt out

    def test_stands_in_the_records_where_it_is_given(self, tiny: Any) -> None:
        kept = tiny.train("kept", algorithm="KD")
        newer = tiny.train("newer", {"kd_newer": 0.5}, algorithm="KD")
        kept_hparams, newer_hparams = (read_records(folder)[0]["hparams"] for folder in (kept, newer))
        assert newer_hparams == kept_hparams | {"kd_newer": 0.5}


class TestFinishedRuns:
    @pytest.mark.parametrize("algorithm", ["ERM", "SMA", "AFT", "KD", "DAFT"])
    def test_are_done(self, algorithm: str) -> None:
        job = find_job(algorithm)
        before = read_files(Path("sweep"))

        def fail(step: int, n_steps: int) -> None:
            raise AssertionError("a step was taken")

        assert train(job.args, quiet=True, on_step=fail) == Path("sweep", job.folder)
        assert read_files(Path("sweep")) == before

    def test_of_others_are_refused(self) -> None:
        args = find_job("ERM").args
        with pytest.raises(UsageError, match="holds a finished run with other arguments .trial_seed is 0 there and 1"):
            train(replace(args, trial_seed=1), quiet=True)


@pytest.mark.parametrize(("algorithm", "kinds"), [("KD", ["ERM"]), ("DAFT", ["AFT", "ERM"])])
def test_teachers_of_then_are_taken(algorithm: str, kinds: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    args = find_job(algorithm).args
    before = read_files(Path("sweep/teachers"))

    again = train(replace(args, output_dir="sweep/again"), quiet=True)

    assert "needs a teacher" not in capfd.readouterr().err
    assert read_files(Path("sweep/teachers")) == before
    then, now = (read_records(folder)[0] for folder in (Path(args.output_dir), again))
    assert now["teacher"].pop("size") and now["teacher"].pop("network")  # which are recorded since
    found = now["teacher"]
    for _ in kinds:
        assert found["path"].endswith("/model.pkl")
        found["path"] = found["path"].removesuffix("/model.pkl")  # which was the folder's
        found = found.get("teacher", {})
    assert now["teacher"] == then["teacher"]  # verified: its hash, its accuracies, its own teacher
    found = now["teacher"]
    for kind in kinds:
        assert found["algorithm"] == kind
        found = found.get("teacher", {})
    assert now["hparams"] == then["hparams"]


def test_tables_of_then_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert collect_results.main(["--input_dir", "sweep", "--format", "json"]) == 0
    tables, then = json.loads(capsys.readouterr().out), json.loads(Path("results.json").read_text())
    for row in (row for table in tables["tables"] for row in table["rows"]):
        assert row.pop("average_stderr") is None  # one trial; what came later
    for table in tables["tables"]:
        assert (table.pop("kind"), table.pop("held_out")) == ("leave-out", table["environments"])
    assert tables == then


def test_decoded_images_of_then_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their key was computed at that commit, with the decoder's version and the files' times as here."""
    monkeypatch.setattr(PIL, "__version__", "0")
    monkeypatch.setattr(PIL.features, "version", lambda name: "0")
    for path in (Path("pictures", label, "1.png") for label in "ab"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 10)
        os.utime(path, ns=(10**18, 10**18))
    domain = ImageFolder("pictures", loader=partial(read_image, allow_truncated=True))
    key = image_cache._describe(domain).hex()
    assert key == "05ef317bbaced8bae914803ac0421e98ff9d2f08b3bb64e68c58620063154dcd"


def test_an_unfinished_run_of_then_is_refused_by_name() -> None:
    stored = json.loads(Path("unfinished/results.jsonl").read_text().splitlines()[0])["args"]
    with pytest.raises(
        UsageError, match=r"unfinished was begun by an earlier version.*finish it there, choose another"
    ):
        train(TrainArgs(**stored), quiet=True)
    assert Path("unfinished/resume.pt").is_file()
