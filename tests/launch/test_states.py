"""How a job stands is read from its folder: every state as it comes about, and whatever a kill may leave."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.states import State, forget_failures, is_done, read_failure, read_states
from daft_domainbed.launch.work import do_job
from daft_domainbed.runtime.locks import claim
from daft_domainbed.runtime.stopping import Stopped
from tests.conftest import HPARAMS, Shelf, Tiny
from tests.processes import WarmPopen, wait_until


@pytest.fixture
def job(tiny: Tiny) -> Job:
    """A job that trains for six steps in the folder `run`, with a record of steps 0, 2, 4 and 5."""
    return Job("student", "run", TrainArgs(**tiny.make_flags()))


def read_state(tiny: Tiny, job: Job, *others: Job) -> State:
    return read_states(tiny.root, [*others, job])[job.folder]


# --- each as it comes about ------------------------------------------------------------------------------------------


def test_not_launched(tiny: Tiny, job: Job) -> None:
    assert read_state(tiny, job) == State("not launched")
    (tiny.root / "run").mkdir()  # before anything else, a run makes its folder
    assert read_state(tiny, job) == State("not launched")


def test_waiting_for_a_teacher(tiny: Tiny, job: Job) -> None:
    teacher = replace(job, stage="erm_teacher", folder="teacher")
    student = replace(job, needs=["teacher"])
    assert read_state(tiny, student, teacher) == State("waiting")
    (tiny.root / "run").mkdir()
    assert read_state(tiny, student, teacher) == State("waiting")
    assert do_job(tiny.root, teacher, threads=1).kind == "done"
    assert read_state(tiny, student, teacher) == State("not launched")


def test_running(tiny: Tiny, job: Job) -> None:
    seen = []
    tiny.train(on_step=lambda step, n_steps: seen.append(read_state(tiny, job)))
    assert seen == [State("running", step=step) for step in (0, 0, 2, 2, 4, 5)]


def test_running_until_it_is_killed(tiny: Tiny, job: Job, start_script: Callable[[str], WarmPopen]) -> None:
    owner = start_script(f"""
import time
from pathlib import Path
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.training.engine import train
def on_step(step, n_steps):
    if step == 4:
        Path({str(tiny.root / "hangs")!r}).touch()
        time.sleep(600)
train(TrainArgs(**{tiny.make_flags()!r}), quiet=True, on_step=on_step)
""")
    wait_until(lambda: (tiny.root / "hangs").exists() or owner.poll() is not None)
    assert read_state(tiny, job) == State("running", step=2)
    owner.kill()
    owner.wait()
    assert read_state(tiny, job) == State("incomplete", step=2)


def test_incomplete_before_its_first_record(tiny: Tiny, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from daft_domainbed.host import contract

    def fail(*args: object) -> None:
        raise Stopped("before anything was learnt")

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(contract.find_host().algorithms.ERM, "update", fail)
        tiny.train()
    assert read_state(tiny, job) == State("incomplete")


def test_incomplete_then_done(
    tiny: Tiny, job: Job, records: Callable[[Path], list[dict[str, Any]]], shelf: Shelf
) -> None:
    shelf.copy(tiny.root / "run", stop_at=4)
    assert read_state(tiny, job) == State("incomplete", step=2)
    run = tiny.train()
    assert read_state(tiny, job) == State("done", seconds=records(run)[-1]["seconds"])


def test_failed(tiny: Tiny, job: Job) -> None:
    failing = replace(job, args=replace(job.args, hparams=json.dumps(HPARAMS | {"weights": "nowhere.pt"})))
    reason = do_job(tiny.root, failing, threads=1).reason
    assert "nowhere.pt" in reason
    assert read_state(tiny, failing) == State("failed", reason=reason)


def test_failed_on_the_way(tiny: Tiny, job: Job) -> None:
    def fail(step: int, n_steps: int) -> None:
        if step == 4:
            raise ValueError("three\nshort\nlines")

    outcome = do_job(tiny.root, job, threads=1, on_step=fail)
    assert outcome.kind == "failed"
    reason = "ValueError: three short lines (traceback in its err.txt)"
    assert read_state(tiny, job) == State("failed", reason=reason, step=2)
    assert (tiny.root / "run/err.txt").read_text().endswith("ValueError: three\nshort\nlines\n")


# --- whatever is left ------------------------------------------------------------------------------------------------


def test_failure_is_told_by_its_first_line(tiny: Tiny, job: Job) -> None:
    folder = tiny.root / "run"
    folder.mkdir()
    assert read_failure(folder) == ""
    for content, reason in (
        (b"first\nsecond\n", "first"),
        (b"", "no reason given"),  # what a full disk leaves
        (b"caf\xe9", "caf\N{REPLACEMENT CHARACTER}"),
    ):
        (folder / "failed").write_bytes(content)
        assert read_state(tiny, job) == State("failed", reason=reason)


def test_done_and_running_count_more_than_an_old_failure(tiny: Tiny, job: Job, shelf: Shelf) -> None:
    run = shelf.copy(tiny.root / "run")
    (run / "failed").write_text("long ago\n")
    assert read_state(tiny, job).kind == "done"
    (run / "done").unlink()
    with claim(run):
        assert read_state(tiny, job).kind == "running"
    assert read_state(tiny, job).kind == "failed"


# (what follows the records, the last step that is told)
TAILS: dict[str, tuple[bytes, int | None]] = {
    "nothing": (b"", 5),
    "half a record": (b'{"step": 7, "args": {"algor', 5),
    "half a character": (b'{"step": 7, "name": "caf\xc3', 5),
    "a record without its end of line": (b'{"step": 7}', 7),
    "no record": (b"[]\n{}\n3\nnull\n", 5),
    "a step that is no number": (b'{"step": "7"}\n', 5),
    "empty lines": (b"\n\n\n", 5),
    "zeros, as after a loss of power": (bytes(5000), 5),
    "deep brackets": (b"[" * 50_000 + b"\n", 5),
    "a huge number": (b"9" * 5000 + b"\n", 5),
    "half a huge record": (b'{"step": 7, "hparams": "' + b"x" * 300_000, None),
    "a huge record": (b'{"step": 7, "hparams": "' + b"x" * 300_000 + b'"}\n', None),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", ["done", "incomplete"])
def test_last_line_may_be_anything(tiny: Tiny, job: Job, tail: str, kind: str) -> None:
    run = tiny.train()
    content, step = TAILS[tail]
    with (run / "results.jsonl").open("ab") as file:
        file.write(content)
    if kind == "incomplete":
        (run / "done").rename(run / "resume.pt")
    state = read_state(tiny, job)
    assert state.kind == kind
    assert kind == "done" or state.step == step
    assert kind == "incomplete" or (state.seconds is None) == (step != 5)


@pytest.mark.parametrize("seconds", ["soon", None, True, [1], float("nan")])
def test_seconds_that_are_no_number(tiny: Tiny, job: Job, seconds: Any, shelf: Shelf) -> None:
    run = shelf.copy(tiny.root / "run")
    (run / "results.jsonl").write_text(json.dumps({"step": 5, "seconds": seconds}) + "\n")
    assert read_state(tiny, job) == State("done")


def test_records_are_not_read_from_the_start(tiny: Tiny, job: Job, shelf: Shelf) -> None:
    run = shelf.copy(tiny.root / "run")
    with (run / "results.jsonl").open("ab") as file:
        file.truncate(2**33)  # takes no room on the disk
        file.write(b'\n{"step": 9, "seconds": 8.5}\n')
    assert read_state(tiny, job) == State("done", seconds=8.5)


def test_folder_that_is_a_file(tiny: Tiny, job: Job) -> None:
    (tiny.root / "run").write_text("mine")
    assert read_state(tiny, job) == State("not launched")
    assert not is_done(tiny.root / "run")


def test_failures_are_forgotten_but_for_those_of_jobs_at_work(tiny: Tiny, job: Job) -> None:
    jobs = [replace(job, folder=name) for name in ("one", "two", "three")]
    for name in ("one", "two"):
        (tiny.root / name).mkdir()
        (tiny.root / name / "failed").write_text("no luck\n")
    with claim(tiny.root / "two"):
        forget_failures(tiny.root, jobs)
    assert [path.parent.name for path in tiny.root.glob("*/failed")] == ["two"]
    assert sorted(os.listdir(tiny.root)) == ["one", "two"]
