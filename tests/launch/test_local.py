"""Whole sweeps of tiny networks, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.arguments import SweepArgs
from daft_domainbed.errors import UsageError
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.local import list_gpus, run_local, run_multi_gpu
from daft_domainbed.launch.options import Options
from daft_domainbed.launch.plan import make_plan
from tests import conftest
from tests.conftest import HPARAMS, TEACHER_HPARAMS, strip_times
from tests.launch.conftest import make_hold
from tests.processes import WarmPopen, list_group, run_warm, wait_until

TINY = HPARAMS | TEACHER_HPARAMS
Start = Callable[..., WarmPopen]


class Diary:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.reports: dict[str, list[tuple[int, int]]] = {}
        self.failures: dict[str, str | None] = {}
        self.at_once = self.most_at_once = 0

    def plan(self, jobs: Sequence[Job]) -> None: ...

    def start(self, job: Job) -> None:
        self.events.append(("start", job.folder))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)

    def advance(self, job: Job, step: int, n_steps: int) -> None:
        self.reports.setdefault(job.folder, []).append((step, n_steps))

    def end(self, job: Job, failure: str | None, seconds: float) -> None:
        if ("start", job.folder) in self.events:
            self.at_once -= 1
        self.events.append(("end", job.folder))
        self.failures[job.folder] = failure


def plan(root: Path, device: str = "cpu", **user: Any) -> list[Job]:
    """All stages of ERM, KD and DAFT with Debug28's first domain held out: five jobs."""
    sweep = SweepArgs(
        datasets=["Debug28"],
        algorithms=["ERM", "KD", "DAFT"],
        output_dir=str(root),
        n_trials=1,
        n_hparams=1,
        single_test_envs=True,
        steps=6,
        checkpoint_freq=2,
        hparams=json.dumps(TINY | user),
        device=device,
    )
    return [job for job in make_plan(sweep) if job.args.test_envs == [0]]


def run(root: Path, jobs: list[Job], n_jobs: int = 2) -> tuple[dict[str, str], Diary]:
    diary = Diary()
    return run_local(root, jobs, Options(n_jobs=n_jobs), diary), diary


def read_records(folder: Path) -> list[dict[str, Any]]:
    """A run's records without what a clock or the place says, nor which device it might have taken."""
    records = [strip_times(record) for record in conftest.read_records(folder)]
    return [record | {"args": record["args"] | {"device": None}} for record in records]


pytestmark = pytest.mark.usefixtures("warm_servers")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Job], dict[str, str], Diary]:
    """A sweep that was run two jobs at a time, by a server that has nothing of the tests."""
    root = tmp_path_factory.mktemp("sweep")
    jobs = plan(root)
    return root, jobs, *run(root, jobs)


Finished = tuple[Path, list[Job], dict[str, str], Diary]


def test_everything_is_run_teachers_first(finished: Finished) -> None:
    root, jobs, failures, diary = finished
    assert failures == {}
    assert len(jobs) == 5
    assert all((root / job.folder / "done").is_file() for job in jobs)
    for job in jobs:
        for need in job.needs:
            assert diary.events.index(("end", need)) < diary.events.index(("start", job.folder))
    # Nobody trained a teacher that the plan did not know.
    assert {f"teachers/{path.name}" for path in (root / "teachers").iterdir()} == {
        job.folder for job in jobs if job.stage != "student"
    }


def test_two_run_at_a_time(finished: Finished) -> None:
    assert finished[3].most_at_once == 2


def test_observer_is_told_the_last_step(finished: Finished) -> None:
    _, jobs, _, diary = finished
    assert {folder: reports[-1] for folder, reports in diary.reports.items()} == {
        job.folder: (job.args.steps, job.args.steps) for job in jobs
    }


def test_student_names_its_teacher_relative_to_itself(finished: Finished) -> None:
    root, jobs, _, _ = finished
    (daft,) = [job for job in jobs if job.args.algorithm == "DAFT"]
    teacher = read_records(root / daft.folder)[0]["teacher"]
    assert teacher["path"] == f"../{daft.needs[0]}/model.pkl"


def test_numbers_do_not_depend_on_how_many_run_at_a_time(finished: Finished, tmp_path: Path) -> None:
    root, jobs, _, _ = finished
    failures, diary = run(tmp_path, plan(tmp_path), n_jobs=1)
    assert failures == {}
    assert diary.most_at_once == 1
    for job in jobs:
        assert read_records(tmp_path / job.folder) == read_records(root / job.folder)


def test_one_job_a_gpu_gives_the_same_numbers(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, jobs, _, _ = finished
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,9")  # of which CUDA knows two
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert list_gpus() == ["3", "1"]
    diary = Diary()
    assert run_multi_gpu(tmp_path, plan(tmp_path, "auto"), Options(), diary) == {}
    assert diary.most_at_once == 2
    for job in jobs:
        assert read_records(tmp_path / job.folder) == read_records(root / job.folder)


def test_multi_gpu_takes_the_cpu_where_that_is_meant(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    root, jobs, _, _ = finished
    assert run_multi_gpu(root, jobs, Options(), Diary()) == {}


def test_multi_gpu_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for visible in ("", "0,1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(UsageError, match="no GPU can be used here; add --device cpu"):
            run_multi_gpu(tmp_path, plan(tmp_path, "auto"), Options(), Diary())


def test_what_is_done_is_not_done_again(finished: Finished) -> None:
    root, jobs, _, _ = finished
    failures, diary = run(root, jobs)
    assert (failures, diary.events) == ({}, [])


def test_failing_teacher_marks_its_students_and_the_rest_goes_on(tmp_path: Path) -> None:
    jobs = plan(tmp_path, teacher_weights=str(tmp_path / "nowhere.pt"))
    failures, diary = run(tmp_path, jobs)
    by_name = {(job.stage, job.args.algorithm): job.folder for job in jobs}
    erm_teacher, aft_teacher = by_name["erm_teacher", "ERM"], by_name["aft_teacher", "AFT"]
    assert "nowhere.pt" in failures[erm_teacher]
    assert failures == {
        erm_teacher: failures[erm_teacher],
        aft_teacher: f"its teacher {erm_teacher} failed",
        by_name["student", "KD"]: f"its teacher {erm_teacher} failed",
        by_name["student", "DAFT"]: f"its teacher {aft_teacher} failed",
    }
    for folder, reason in failures.items():
        assert (tmp_path / folder / "failed").read_text() == f"{reason}\n"
        assert diary.failures[folder] == reason
    assert (tmp_path / by_name["student", "ERM"] / "done").is_file()
    assert ("start", aft_teacher) not in diary.events


def test_failure_is_forgotten_at_the_next_launch(finished: Finished, tmp_path: Path) -> None:
    jobs = [job for job in plan(tmp_path) if job.args.algorithm == "ERM" and job.stage == "student"]
    folder = tmp_path / jobs[0].folder
    folder.mkdir()
    (folder / "failed").write_text("the disk was full\n")
    assert run(tmp_path, jobs)[0] == {}
    assert not (folder / "failed").exists()
    assert read_records(folder) == read_records(finished[0] / jobs[0].folder)


# --- kill -9 ---------------------------------------------------------------------------------------------------------

KD_FLAGS = [
    *("--dataset", "Debug28", "--algorithms", "KD", "--steps", "9", "--checkpoint_freq", "2", "--device", "cpu"),
    *("--n_jobs", "2", "--hparams", json.dumps(TINY)),
]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for orphans in /proc")
def test_killed_launcher_leaves_no_orphan_and_its_sweep_goes_on(tmp_path: Path, start_script: Start) -> None:
    root, whole = tmp_path / "killed", tmp_path / "whole"
    flags = [*KD_FLAGS, "--output_dir", str(root)]
    code = f"""
from daft_domainbed.cli import run_command
{make_hold(tmp_path, "KD", 5, until="False")}
run_command("run", {flags!r})
"""
    launcher = start_script(code, start_new_session=True)
    # Both places are taken by students in the middle; their teachers are done.
    wait_until(lambda: len(list(tmp_path.glob("held-*"))) == 2 or launcher.poll() is not None)
    assert len(list_group(launcher.pid)) == 4  # launcher, server, two jobs
    begun = [path.parent for path in root.glob("*/results.jsonl")]
    done = {path.parent: path.stat().st_mtime_ns for path in root.rglob("done")}
    records = {folder: (folder / "results.jsonl").read_bytes() for folder in done}
    assert (len(begun), len(done)) == (2, 3)
    launcher.kill()
    wait_until(lambda: not list_group(launcher.pid), "the last orphan ends", seconds=30)
    assert not any((folder / "done").exists() for folder in begun)
    assert not list(root.rglob("failed"))

    again = run_warm([sys.executable, "-m", "daft_domainbed.scripts.run", *flags])
    assert again.returncode == 0, again.stderr
    # What was done was left alone, what was begun was gone on with, and its numbers show nothing of it.
    assert "[4/6]" in again.stderr and "[3/6]" not in again.stderr
    assert {folder: (folder / "done").stat().st_mtime_ns for folder in done} == done
    assert {folder: (folder / "results.jsonl").read_bytes() for folder in done} == records
    sweep = SweepArgs(
        datasets=["Debug28"],
        algorithms=["KD"],
        output_dir=str(whole),
        n_trials=1,
        n_hparams=1,
        single_test_envs=True,
        steps=9,
        checkpoint_freq=2,
        hparams=json.dumps(TINY),
        device="cpu",
    )
    assert run(whole, make_plan(sweep))[0] == {}
    for folder in begun:
        assert "going on at step" in (folder / "err.txt").read_text()
        assert read_records(folder) == read_records(whole / folder.name)


def test_killed_job_is_reported_and_goes_on_at_the_next_launch(tmp_path: Path) -> None:
    (job,) = [job for job in plan(tmp_path) if job.args.algorithm == "ERM" and job.stage == "student"]
    (tmp_path / "hold.py").write_text(make_hold(tmp_path, "ERM", 3, until="False"))
    folder = tmp_path / job.folder

    class Killer(Diary):
        def advance(self, job: Job, step: int, n_steps: int) -> None:
            wait_until(lambda: list(tmp_path.glob("held-*")))
            os.kill(json.loads((folder / ".lock").read_text())["pid"], signal.SIGKILL)

    held = replace(job, imports=[str(tmp_path / "hold.py")])
    failures = run_local(tmp_path, [held], Options(n_jobs=1), Killer())
    assert failures == {job.folder: "its process was ended from outside; the same command goes on where it was"}
    assert not (folder / "failed").exists()
    assert run(tmp_path, [job])[0] == {}
    assert [record["step"] for record in read_records(folder)] == [0, 2, 4, 5]
