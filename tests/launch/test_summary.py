"""What is printed of a sweep: counts, failures, rate, time left, disk."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.launch import summary
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.states import State, read_states
from tests.launch.conftest import make_sweep, plan, run_here


def make_job(folder: str, algorithm: str = "ERM", stage: str = "student", steps: int | None = 100) -> Job:
    return Job(stage, folder, TrainArgs(dataset="PACS", algorithm=algorithm, steps=steps))


TEACHERS = [make_job(f"teachers/{i}", stage="erm_teacher") for i in range(2)]
STUDENTS = [make_job(f"{algorithm}{i}", algorithm) for algorithm in ("ERM", "KD") for i in range(3)]
JOBS = [*TEACHERS, *STUDENTS]
STATES = {
    "teachers/0": State("done", seconds=100.0),
    "teachers/1": State("running", step=25),
    "ERM0": State("done", seconds=10.0),
    "ERM1": State("done", seconds=20.0),
    "ERM2": State("incomplete", step=50),
    "KD0": State("done", seconds=40.0),
    "KD1": State("waiting"),
    "KD2": State("failed", reason="the disk is full"),
}


# --- counts ----------------------------------------------------------------------------------------------------------


def test_jobs_are_counted_by_kind_and_state() -> None:
    assert summary.format_counts(JOBS, STATES) == "\n".join(
        [
            "                           done       running    incomplete        failed       waiting           all",
            "ERM teacher, PACS             1             1             0             0             0             2",
            "ERM, PACS                     2             0             1             0             0             3",
            "KD, PACS                      1             0             0             1             1             3",
            "all                           4             1             1             1             1             8",
        ]
    )


# --- failures --------------------------------------------------------------------------------------------------------


def format_failures(reasons: Sequence[str]) -> list[str]:
    jobs = [make_job(str(i)) for i in range(len(reasons))]
    states = {job.folder: State("failed", reason) for job, reason in zip(jobs, reasons, strict=True)}
    return summary.format_failures(jobs, states).splitlines()


def test_causes_are_shown_before_what_follows_from_them() -> None:
    assert format_failures(["its teacher x failed", "nan", "its teacher y failed", "no room"]) == [
        "failed: 1: nan",
        "failed: 3: no room",
        "failed: 0 and 1 more: its teacher x failed",
    ]


def test_many_failures_are_cut_short() -> None:
    lines = format_failures([f"nan {i}" for i in range(14)])
    assert lines == [*(f"failed: {i}: nan {i}" for i in range(10)), "... and 4 more causes"]
    assert len(format_failures([f"nan {i}" for i in range(10)])) == 10
    assert format_failures(["nan"] * 14) == ["failed: 0 and 13 more: nan"]  # one cause is one line


def test_no_failures() -> None:
    assert format_failures([]) == []


# --- time ------------------------------------------------------------------------------------------------------------


def test_work_left_is_each_kinds_mean_and_what_is_left_of_each_job() -> None:
    # A teacher at 25 of 100 steps, 75 s; an ERM at 50, 7.5 s; a KD, 40 s; what failed is no work that is left.
    assert summary.estimate_seconds_left(JOBS, STATES) == pytest.approx(75 + 7.5 + 40)


def test_work_left_is_unknown_while_a_kind_has_none_done() -> None:
    states = STATES | {"KD0": State("waiting")}
    assert summary.estimate_seconds_left(JOBS, states) is None
    states |= {f"KD{i}": State("failed") for i in range(3)}
    assert summary.estimate_seconds_left(JOBS, states) == pytest.approx(75 + 7.5)


def test_nothing_is_left_when_all_is_done() -> None:
    assert summary.estimate_seconds_left(JOBS, {job.folder: State("done") for job in JOBS}) == 0


def test_job_that_does_not_say_its_steps_counts_whole() -> None:
    jobs = [make_job("one", steps=None), make_job("two", steps=None)]
    states = {"one": State("done", seconds=30.0), "two": State("running", step=500)}
    assert summary.estimate_seconds_left(jobs, states) == 30


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A sweep's folder in which half of what is done was done more than an hour ago."""
    for folder, age in (("teachers/0", 7200), ("ERM0", 4000), ("ERM1", 3000), ("KD0", 60)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "done").touch()
        os.utime(tmp_path / folder / "done", (time.time() - age,) * 2)
    return tmp_path


def test_rate_is_the_last_hours(ended: Path) -> None:
    assert summary.format_time(ended, JOBS, STATES) == "2 jobs done in the last hour; time left: 2 min 02 s of work"


def test_time_left_with_several_at_a_time(ended: Path) -> None:
    states = STATES | {"ERM2": State("running", step=50)}
    says = "2 jobs done in the last hour; time left: 2 min 02 s of work, about 1 min 01 s with 2 jobs at a time"
    assert summary.format_time(ended, JOBS, states) == says


def test_time_left_that_is_not_known_yet(tmp_path: Path) -> None:
    states = {job.folder: State("not launched") for job in JOBS}
    assert summary.format_time(tmp_path, JOBS, states) == "time left: known once a job of each kind is done"


def test_no_time_is_left(tmp_path: Path) -> None:
    assert summary.format_time(tmp_path, JOBS, {job.folder: State("done") for job in JOBS}) == ""


# --- disk ------------------------------------------------------------------------------------------------------------


def test_files_of_a_folder_are_measured(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(100))
    (tmp_path / "two").write_bytes(bytes(23))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "three").write_bytes(bytes(1000))
    assert summary.measure_folder(tmp_path) == 123
    assert summary.measure_folder(tmp_path / "nowhere") == 0
    assert summary.measure_folder(tmp_path / "one") == 0


def test_disk_is_estimated_from_weights_before_anything_is_done(tmp_path: Path) -> None:
    """Of a network whose files are mostly weights: ResNet-18's 11.2 million, twice, in four bytes each."""
    hparams = json.dumps({"backbone": "resnet18", "weights": "none"})
    jobs = make_plan(make_sweep(tmp_path, datasets=["EmojiStyles"], hparams=hparams))
    text = summary.format_disk(tmp_path, jobs, read_states(tmp_path, jobs))
    per_job = 2 * 4 * 11.2e6
    assert text == f"disk: 0 B in use, about {summary.format_bytes(per_job * len(jobs))} when all is done"


def test_disk_of_records_alone_is_not_estimated_from_weights(tmp_path: Path) -> None:
    jobs = make_plan(make_sweep(tmp_path, skip_model_save=True))
    text = summary.format_disk(tmp_path, jobs, read_states(tmp_path, jobs))
    assert text == "disk: 0 B in use, about 0 B when all is done"


def test_disk_of_what_cannot_be_built_is_not_estimated(tmp_path: Path) -> None:
    job = Job("student", "run", TrainArgs(dataset="Debug29"))
    assert summary.format_disk(tmp_path, [job], {"run": State("not launched")}) == "disk: 0 B in use"


def test_disk_is_estimated_from_what_finished_jobs_took(tmp_path: Path) -> None:
    jobs = plan(tmp_path, "KD")
    student = next(job for job in jobs if job.needs)
    run_here(tmp_path, [next(job for job in jobs if job.folder in student.needs)])
    run_here(tmp_path, [student])
    text = summary.format_disk(tmp_path, jobs, read_states(tmp_path, jobs))
    run_here(tmp_path, jobs)
    used = sum(path.stat().st_size for path in tmp_path.rglob("*/*") if path.is_file())
    estimate = re.search(r", about (\d+) kB when all is done$", text)
    assert estimate and int(estimate[1]) == pytest.approx(used / 1000, rel=0.01)  # digits of records differ
    assert summary.format_disk(tmp_path, jobs, read_states(tmp_path, jobs)) == (
        f"disk: {summary.format_bytes(used)} in use"
    )


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9_949, "9.9 kB"), (9_960, "10 kB"), (999_499, "999 kB")]
    + [(999_600, "1.0 MB"), (2.5e9, "2.5 GB"), (3e13, "30000 GB")],
)
def test_sizes(size: float, text: str) -> None:
    assert summary.format_bytes(size) == text
