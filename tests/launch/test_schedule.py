"""The loop over a sweep's graph of jobs, with a pool that trains nothing: any graph, any fate, any other launches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.launch import schedule
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.schedule import Ended, Progress, run_graph
from daft_domainbed.launch.states import read_failure
from daft_domainbed.launch.work import Outcome
from daft_domainbed.runtime import locks, stopping
from daft_domainbed.runtime.stopping import Stopped


@dataclass
class Sweep:
    """Jobs and what is to become of them.

    Attributes:
        jobs: Teachers first.
        fates: How each job ends, time after time: "busy" and "stopped" are not the end of it.
        done: Those that were done before.
        failed: Those that failed at an earlier launch.
        claims: Those that another launch is at, and what becomes of them there: "done", "failed" or "dead".
        size: How many run at a time.
        order: Which of the running jobs ends next, and which of the other launch's.
        stops_at: When it is asked to stop.
    """

    jobs: list[Job]
    fates: dict[str, list[str]]
    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    claims: dict[str, str] = field(default_factory=dict)
    size: int = 1
    order: list[int] = field(default_factory=lambda: [0])
    stops_at: int | None = None

    def list_failing(self) -> dict[str, list[str]]:
        """The failures to expect, with the reasons that each may have: of several teachers the first that fails."""
        failing: dict[str, list[str]] = {}
        for job in self.jobs:
            if job.folder in self.done:
                continue
            fate, reasons = self.claims.get(job.folder, "dead"), [f"{job.folder} had no luck"]
            if fate == "dead":
                fate = self.fates[job.folder][-1]
                if failed := [need for need in job.needs if need in failing]:
                    fate, reasons = "failed", [f"its teacher {need} failed" for need in failed]
            if fate == "failed":
                failing[job.folder] = reasons
        return failing


class World:
    """A pool, an observer and another launch, all of which check what they are asked."""

    def __init__(self, sweep: Sweep, root: Path) -> None:
        self.sweep, self.root = sweep, root
        self.running: dict[str, Job] = {}
        self.fates = {folder: deque(fates) for folder, fates in sweep.fates.items()}
        self.started: list[str] = []
        self.shown: dict[str, int] = {}
        self.ends: dict[str, str | None] = {}
        self.n_waits = self.n_kills = 0
        self.is_stopping = False
        self.others = ExitStack()
        self.claims: dict[str, ExitStack] = {}
        for folder in sweep.done:
            self.leave(folder, "done")
        for folder in sweep.failed:
            self.leave(folder, "failed")
        for folder in sweep.claims:
            (root / folder).mkdir(exist_ok=True)
            self.claims[folder] = self.others.enter_context(ExitStack())
            self.claims[folder].enter_context(locks.claim(root / folder))

    def leave(self, folder: str, kind: str) -> None:
        """Leave what a job leaves behind that has ended so."""
        (self.root / folder).mkdir(exist_ok=True)
        (self.root / folder / kind).write_text(f"{folder} had no luck\n")

    def is_done(self, folder: str) -> bool:
        return (self.root / folder / "done").is_file()

    def draw(self, items: dict[str, Any]) -> str:
        order = self.sweep.order
        return list(items)[order[self.n_waits % len(order)] % len(items)]

    # The pool.

    def has_room(self) -> bool:
        return len(self.running) < self.sweep.size

    def start(self, job: Job) -> None:
        assert self.has_room()
        assert not self.is_stopping
        assert job.folder not in self.running
        assert not self.is_done(job.folder)
        assert job.folder not in self.claims
        assert all(map(self.is_done, job.needs))
        assert not read_failure(self.root / job.folder)
        self.running[job.folder] = job
        self.started.append(job.folder)

    def wait(self, seconds: float) -> Iterator[Progress | Ended]:
        self.n_waits += 1
        assert self.n_waits < 1000, "it goes round in circles"
        if self.n_waits == self.sweep.stops_at:
            stopping.request()
        if self.claims:
            self.let_other_launch_go_on()
        if self.running:
            folder = self.draw(self.running)
            yield Progress(self.running[folder], 1, 2)
            yield Ended(self.running[folder], self.end_one(folder))

    def let_other_launch_go_on(self) -> None:
        folder = self.draw(self.claims)
        if (fate := self.sweep.claims[folder]) != "dead":
            self.leave(folder, fate)
        self.claims.pop(folder).close()

    def end_one(self, folder: str) -> Outcome:
        del self.running[folder]
        if self.is_stopping:
            return Outcome("stopped")
        kind: Any = self.fates[folder].popleft()
        if kind in ("done", "failed"):
            self.leave(folder, kind)
        return Outcome(kind, f"{folder} had no luck" if kind == "failed" else "")

    def stop(self) -> None:
        assert not self.is_stopping
        self.is_stopping = True

    def kill(self) -> None:
        self.n_kills += 1


class Diary:
    """An observer that checks the order of what it is told."""

    def __init__(self) -> None:
        self.planned: set[str] = set()
        self.running: set[str] = set()
        self.ends: dict[str, str | None] = {}

    def plan(self, jobs: Sequence[Job]) -> None:
        self.planned = {job.folder for job in jobs}

    def start(self, job: Job) -> None:
        assert job.folder not in self.ends
        self.running.add(job.folder)

    def advance(self, job: Job, step: int, n_steps: int) -> None:
        assert job.folder in self.running
        assert job.folder not in self.ends

    def end(self, job: Job, failure: str | None, seconds: float) -> None:
        assert job.folder in self.planned
        assert job.folder not in self.ends
        assert seconds >= 0
        self.ends[job.folder] = failure


def make_job(folder: str, *needs: str) -> Job:
    return Job("student", folder, TrainArgs(), list(needs))


@st.composite
def sweeps(draw: st.DrawFn, *, stops: bool = False) -> Sweep:
    """Up to a dozen jobs in three layers, in any state, with any fate."""
    jobs: list[Job] = []
    layer: list[str] = []
    for stage in "eas":
        before = layer
        layer = [f"{stage}{i}" for i in range(draw(st.integers(0, 4)))]
        for folder in layer:
            n_needs = draw(st.integers(0, min(2, len(before))))
            jobs.append(make_job(folder, *draw(st.permutations(before))[:n_needs]))
    folders = [job.folder for job in jobs]
    some = st.sets(st.sampled_from(folders)) if folders else st.just(set())
    fates = {
        folder: [*draw(st.lists(st.sampled_from(["busy", "stopped"]), max_size=2)), draw(st.sampled_from(ENDS))]
        for folder in folders
    }
    done, claimed = draw(some), draw(some)
    return Sweep(
        jobs,
        fates,
        done=done,
        failed=draw(some) - done - claimed,
        claims={folder: draw(st.sampled_from([*ENDS, "dead"])) for folder in sorted(claimed - done)},
        size=draw(st.integers(1, 3)),
        order=draw(st.lists(st.integers(0, 9), min_size=1, max_size=9)),
        stops_at=draw(st.integers(1, 12)) if stops else None,
    )


ENDS = ["done", "done", "failed"]


@pytest.fixture(autouse=True, scope="module")
def look_always() -> Iterator[None]:
    """Other launches are looked at again at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "SECONDS_BETWEEN_LOOKS", 0.0)
        yield


def run(sweep: Sweep) -> tuple[World, Diary, dict[str, str] | Stopped, dict[str, str]]:
    """Run a sweep; return what came of it, and each folder's `failed`."""
    with TemporaryDirectory() as name, stopping.listening():
        world, diary = World(sweep, Path(name)), Diary()
        end: dict[str, str] | Stopped
        with world.others:
            try:
                end = run_graph(Path(name), sweep.jobs, world, diary)
            except Stopped as stopped:
                end = stopped
        # Of each job that is not done as it begins, others' included, the end is told.
        assert isinstance(end, Stopped) or diary.ends.keys() == diary.planned
        marks = {job.folder: read_failure(Path(name) / job.folder) for job in sweep.jobs}
        assert world.n_kills == 1
        for job in sweep.jobs:
            if world.is_done(job.folder):
                world.ends[job.folder] = "done"
        return world, diary, end, {folder: mark for folder, mark in marks.items() if mark}


@settings(max_examples=100)
@given(sweeps())
def test_all_is_done_but_for_what_fails_and_what_depends_on_it(sweep: Sweep) -> None:
    world, diary, failures, marks = run(sweep)
    expected = sweep.list_failing()
    assert isinstance(failures, dict)
    assert failures.keys() == expected.keys()
    assert all(reason in expected[folder] for folder, reason in failures.items())
    assert marks == failures
    assert set(world.ends) == {job.folder for job in sweep.jobs} - failures.keys()
    assert not world.running
    # Told of everything that was not done before, once.
    assert diary.ends == {job.folder: failures.get(job.folder) for job in sweep.jobs if job.folder not in sweep.done}


@settings(max_examples=100)
@given(sweeps())
def test_nothing_is_started_more_often_than_it_has_to_be(sweep: Sweep) -> None:
    """What is started at all is checked by the pool; here, that each start was for something."""
    world, _, _, _ = run(sweep)
    failing = sweep.list_failing()
    for job in sweep.jobs:
        is_ours = job.folder not in sweep.done and sweep.claims.get(job.folder, "dead") == "dead"
        is_held_up = any(need in failing for need in job.needs)
        expected = len(sweep.fates[job.folder]) if is_ours and not is_held_up else 0
        assert world.started.count(job.folder) == expected


@settings(max_examples=100)
@given(sweeps(stops=True))
def test_asked_to_stop_it_starts_no_more_and_waits_for_what_is_running(sweep: Sweep) -> None:
    world, diary, end, _ = run(sweep)
    assert not world.running
    if isinstance(end, Stopped):
        assert "the same command goes on" in str(end)
        assert world.n_waits <= sweep.stops_at + sweep.size  # type: ignore[operator]
        open_jobs = {job.folder for job in sweep.jobs} - sweep.done - diary.ends.keys()
        assert open_jobs
    else:  # all was done before
        assert end.keys() == sweep.list_failing().keys()


def test_a_failed_teacher_fails_all_behind_it_and_no_other() -> None:
    jobs = [
        *(make_job("erm0"), make_job("erm1"), make_job("aft0", "erm0"), make_job("aft1", "erm1")),
        *(make_job("daft0", "aft0"), make_job("daft1", "aft1"), make_job("plain")),
    ]
    fates = {job.folder: ["done"] for job in jobs} | {"erm0": ["failed"]}
    world, diary, failures, marks = run(Sweep(jobs, fates, size=2))
    assert (
        failures
        == marks
        == {
            "erm0": "erm0 had no luck",
            "aft0": "its teacher erm0 failed",
            "daft0": "its teacher aft0 failed",
        }
    )
    assert set(world.started) == {"erm0", "erm1", "aft1", "daft1", "plain"}


def test_stopped_job_is_started_again() -> None:
    world, _, failures, _ = run(Sweep([make_job("one")], {"one": ["stopped", "stopped", "done"]}))
    assert failures == {}
    assert world.started == ["one"] * 3


def test_job_of_a_launch_that_dies_is_taken_over() -> None:
    world, _, failures, _ = run(Sweep([make_job("one")], {"one": ["done"]}, claims={"one": "dead"}))
    assert failures == {}
    assert world.started == ["one"]


def test_job_of_another_launch_is_left_to_it() -> None:
    sweep = Sweep([make_job("one"), make_job("two", "one")], {"one": ["done"], "two": ["done"]}, claims={"one": "done"})
    world, diary, failures, _ = run(sweep)
    assert failures == {}
    assert world.started == ["two"]
    assert diary.ends == {"one": None, "two": None}


def test_failure_in_another_launch_is_one_here() -> None:
    sweep = Sweep([make_job("one"), make_job("two", "one")], {"one": ["done"], "two": ["done"]})
    sweep.claims = {"one": "failed"}
    world, _, failures, _ = run(sweep)
    assert failures == {"one": "one had no luck", "two": "its teacher one failed"}
    assert world.started == []


def test_other_launches_are_looked_at_from_time_to_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [0.0], []

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    def look(folder: Path) -> bool:
        looks.append(now[0])
        return now[0] < 2.5

    monkeypatch.setattr(schedule, "SECONDS_BETWEEN_LOOKS", 1.0)
    monkeypatch.setattr(schedule, "time", Clock)
    monkeypatch.setattr(schedule, "is_claimed", look)
    world = World(Sweep([make_job("one")], {"one": ["done"]}), tmp_path)
    wait = world.wait

    def wait_a_while(seconds: float) -> Iterator[Progress | Ended]:
        now[0] += 0.25
        return wait(seconds)

    world.wait = wait_a_while  # type: ignore[method-assign]
    assert run_graph(tmp_path, world.sweep.jobs, world, Diary()) == {}
    assert looks == [0.0, 1.0, 2.0, 3.0]


def test_what_runs_is_ended_where_the_loop_breaks(tmp_path: Path) -> None:
    class Broken(World):
        def wait(self, seconds: float) -> Iterator[Progress | Ended]:
            raise KeyboardInterrupt

    world = Broken(Sweep([make_job("one")], {"one": ["done"]}), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_graph(tmp_path, world.sweep.jobs, world, Diary())
    assert world.n_kills == 1


def test_nothing_to_do(tmp_path: Path) -> None:
    world = World(Sweep([], {}), tmp_path)
    assert run_graph(tmp_path, [], world, Diary()) == {}
    assert world.n_waits == 0
