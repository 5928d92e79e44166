"""One job of a sweep, as every launcher has it done: how it ends, what it says, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from daft_domainbed.host import contract
from daft_domainbed.launch import states, work
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.work import Outcome, do_job
from daft_domainbed.runtime import locks, stopping
from tests.launch.conftest import plan
from tests.processes import WarmPopen

Read = Callable[[Path], dict[str, str]]
Capture = pytest.CaptureFixture[str]
Start = Callable[[str], WarmPopen]


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """An ERM teacher and the KD student that needs it, of a sweep with a plan."""
    return pick(plan(tmp_path / "sweep", "KD"))


def pick(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job.args.test_envs == [0]]


def list_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- as a program ----------------------------------------------------------------------------------------------------


def test_from_the_shell(tmp_path: Path, jobs: list[Job]) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "daft_domainbed.launch.work", str(tmp_path / "sweep"), jobs[0].folder]
    ended = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert list_names(tmp_path / "sweep" / jobs[0].folder) == {
        *("results.jsonl", "model.pkl", "model_best.pkl", "done", "out.txt", "err.txt")
    }


def test_done_is_zero_and_nothing_the_second_time(tmp_path: Path, jobs: list[Job], capfd: Capture) -> None:
    root = tmp_path / "sweep"
    for job in jobs:
        assert work.main([str(root), job.folder]) == 0
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for job in jobs:
        assert work.main([str(root), job.folder]) == 0
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("root", "folder", "says"),
    [
        ("nowhere", "job", "nowhere holds no sweep: it has no plan.json; 'daft-domainbed sweep launch' writes it"),
        ("sweep", "job", "sweep has no job job: the launcher 'dummy' prints each job's command"),
    ],
)
def test_job_that_is_in_no_plan(
    tmp_path: Path, jobs: list[Job], capfd: Capture, root: str, folder: str, says: str
) -> None:
    assert work.main([str(tmp_path / root), folder]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize("argv", [["sweep"], ["sweep", "job", "--threads", "0"], ["sweep", "job", "--thread", "x"]])
def test_arguments_that_cannot_be(argv: list[str], capfd: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        work.main(argv)
    assert ended.value.code == 2


def test_failure_is_one_and_a_line(tmp_path: Path, capfd: Capture) -> None:
    (job,) = pick(plan(tmp_path, user={"weights": "nowhere.pt"}))
    assert work.main([str(tmp_path), job.folder]) == 1
    line = capfd.readouterr().err
    assert "nowhere.pt" in line
    assert (tmp_path / job.folder / "failed").read_text() == line


def test_another_process_is_at_it_is_zero_and_nothing(tmp_path: Path, jobs: list[Job], capfd: Capture) -> None:
    folder = tmp_path / "sweep" / jobs[0].folder
    folder.mkdir(parents=True)
    with locks.claim(folder):
        assert work.main([str(tmp_path / "sweep"), jobs[0].folder]) == 0
        assert list_names(folder) == {".lock"}
    assert capfd.readouterr() == ("", "")


def make_code(root: Path, job: Job, at: int) -> str:
    """Return a script that does a job and receives a signal in the middle of a step."""
    return f"""
import os, signal, sys
sys.stderr = open({str(root / "log")!r}, "w")
from daft_domainbed.host.contract import find_host
from daft_domainbed.launch import work
kind, left = find_host().algorithms.ERM, {at}
update = kind.update
def update_and_hit(self, *args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return update(self, *args)
kind.update = update_and_hit
sys.exit(work.main([{str(root)!r}, {job.folder!r}]))
"""


@pytest.mark.parametrize("at", [1, 2, 3])
def test_stopped_is_143_and_it_goes_on(
    tmp_path: Path, jobs: list[Job], start_script: Start, outcome: Read, at: int
) -> None:
    root, job = tmp_path / "sweep", jobs[0]
    process = start_script(make_code(root, job, at))
    process.wait(120)
    assert process.returncode == 143
    assert (root / "log").read_text() == f"stopped at step {at} of 4 in {root / job.folder}; the same command goes on\n"
    assert {"resume.pt"} <= list_names(root / job.folder)
    assert not {"failed", ".lock", "done"} & list_names(root / job.folder)
    assert do_job(root, job, threads=1) == Outcome("done")
    (other,) = [other for other in pick(plan(tmp_path / "other", "KD")) if other.folder == job.folder]
    assert do_job(tmp_path / "other", other, threads=1) == Outcome("done")
    assert outcome(root / job.folder) == outcome(tmp_path / "other" / job.folder)


# --- how it ends -----------------------------------------------------------------------------------------------------


def test_student_of_a_failed_teacher_is_failed_and_not_trained(tmp_path: Path, jobs: list[Job]) -> None:
    root = tmp_path / "sweep"
    teacher, student = jobs
    states.write_failure(root / teacher.folder, "no luck")
    reason = f"its teacher {teacher.folder} failed"
    assert do_job(root, student, threads=1) == Outcome("failed", reason)
    assert list_names(root / student.folder) == {"failed"}
    # Tried again, with the teacher no longer a failed one.
    assert do_job(root, teacher, threads=1) == Outcome("done")
    assert do_job(root, student, threads=1) == Outcome("done")
    assert not list(root.rglob("failed"))


def test_missing_teacher_is_trained_on_the_way(tmp_path: Path, jobs: list[Job], outcome: Read) -> None:
    teacher, student = jobs
    assert do_job(tmp_path / "sweep", student, threads=1) == Outcome("done")
    for job in pick(plan(tmp_path / "other", "KD")):
        assert do_job(tmp_path / "other", job, threads=1) == Outcome("done")
    for job in jobs:
        assert outcome(tmp_path / "sweep" / job.folder) == outcome(tmp_path / "other" / job.folder)
    assert not list((tmp_path / "sweep").rglob(".lock"))


def test_job_that_is_taken_over_is_the_others(tmp_path: Path, jobs: list[Job]) -> None:
    folder = tmp_path / "sweep" / jobs[0].folder

    def lose(step: int, n_steps: int) -> None:
        if step == 2:
            (folder / ".lock").unlink()
            (folder / ".lock").write_text("{}")

    assert do_job(tmp_path / "sweep", jobs[0], threads=1, on_step=lose) == Outcome("busy")
    assert not (folder / "failed").exists()
    assert (folder / ".lock").read_text() == "{}"


def test_mistake_in_an_algorithm_leaves_its_traceback(
    tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ValueError("shape\nmismatch")

    with monkeypatch.context() as patch:
        patch.setattr(contract.find_host().algorithms.ERM, "update", fail)
        ended = do_job(tmp_path / "sweep", jobs[0], threads=1)
    folder = tmp_path / "sweep" / jobs[0].folder
    assert ended == Outcome("failed", "ValueError: shape mismatch (traceback in its err.txt)")
    assert (folder / "err.txt").read_text().startswith("Traceback (most recent call last):\n")
    assert (folder / "failed").read_text() == f"{ended.reason}\n"
    assert do_job(tmp_path / "sweep", jobs[0], threads=1) == Outcome("done")
    assert not (folder / "failed").exists()


def test_asked_to_stop_it_says_where(tmp_path: Path, jobs: list[Job]) -> None:
    def stop(step: int, n_steps: int) -> None:
        if step == 3:
            stopping.request()

    folder = tmp_path / "sweep" / jobs[0].folder
    with stopping.listening():
        ended = do_job(tmp_path / "sweep", jobs[0], threads=1, on_step=stop)
    assert ended == Outcome("stopped", f"stopped at step 3 of 4 in {folder}; the same command goes on")


def test_threads_are_as_many_as_told_and_recorded(tmp_path: Path, jobs: list[Job]) -> None:
    for job, threads in zip(jobs, (2, 1), strict=True):  # the second one's are this process's
        assert do_job(tmp_path / "sweep", job, threads=threads) == Outcome("done")
        assert torch.get_num_threads() == threads
        first = (tmp_path / "sweep" / job.folder / "results.jsonl").read_text().splitlines()[0]
        assert json.loads(first)["machine"]["threads"] == threads


def test_sweep_may_have_moved(tmp_path: Path, jobs: list[Job]) -> None:
    for job in jobs[:1]:
        assert do_job(tmp_path / "sweep", job, threads=1) == Outcome("done")
    (tmp_path / "sweep").rename(tmp_path / "moved")
    for job in jobs:
        assert work.main([str(tmp_path / "moved"), job.folder]) == 0
    assert not (tmp_path / "sweep").exists()


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 4096, 30_000, 90_000, 150_000])
def test_full_disk_fails_the_job_and_with_room_it_goes_on(
    tmp_path: Path, small_disk: Path, outcome: Read, room: int
) -> None:
    root = small_disk / "sweep"
    teacher, student = pick(plan(root, "KD", n_trials=1))
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(bytes(free - room))
    for _ in range(2):
        ended = do_job(root, student, threads=1)
        assert ended.kind == "failed"
        assert ended.reason == "the disk is full: free some space and launch again"
        assert not [path.name for path in root.rglob(".*")]
    (small_disk / "filler").unlink()
    assert do_job(root, student, threads=1) == Outcome("done")
    assert not list(root.rglob("failed"))
    for job in pick(plan(tmp_path / "other", "KD")):
        do_job(tmp_path / "other", job, threads=1)
        assert outcome(root / job.folder) == outcome(tmp_path / "other" / job.folder)
