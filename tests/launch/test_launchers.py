"""Launchers by name, and those in DomainBed's manner, which are given commands."""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed import plugin
from daft_domainbed.errors import UsageError
from daft_domainbed.host import contract
from daft_domainbed.launch import launchers, work
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.launchers import find_launcher, make_command
from daft_domainbed.launch.options import Options
from daft_domainbed.launch.states import is_done, write_failure
from daft_domainbed.runtime import stopping
from daft_domainbed.runtime.stopping import Stopped
from tests.launch.conftest import plan
from tests.launch.test_local import Diary

Own = Callable[[Callable[[list[str]], Any]], launchers.Launcher]


def launch(run: launchers.Launcher, root: Path, jobs: list[Job]) -> dict[str, str] | None:
    return run(root, jobs, Options(), Diary())


def do_command(command: str) -> int:
    """Run a job's command in this process, which spares the start of another one."""
    program, *argv = shlex.split(command)
    assert [program, *argv[:2]] == [sys.executable, "-m", "daft_domainbed.launch.work"]
    return work.main(argv[2:])


def read_jobs_of(commands: list[str]) -> list[str]:
    return [shlex.split(command)[4] for command in commands]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Own:
    """Makes a launcher of a function, as an installed package has one."""

    def make(function: Callable[[list[str]], Any]) -> launchers.Launcher:
        site = tmp_path / "site"
        information = site / "mine-1.0.dist-info"
        information.mkdir(parents=True, exist_ok=True)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
        entry_points = f"[{launchers.ENTRY_POINTS}]\nmy_cluster = mine_launcher:launch\n"
        (information / "entry_points.txt").write_text(entry_points)
        (site / "mine_launcher.py").write_text("def launch(commands):\n    function(commands)\n")
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, "mine_launcher", raising=False)
        module = importlib.import_module("mine_launcher")
        monkeypatch.setattr(module, "function", function, raising=False)
        return find_launcher("my_cluster", "embedded")

    return make


# --- by name ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "multi_gpu", "slurm", "ray", "dummy"])
def test_ours_are_found(name: str) -> None:
    assert callable(find_launcher(name, "embedded"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("locl", "no launcher 'locl'. Did you mean 'local'? There are local, multi_gpu, slurm, ray, dummy"),
        ("Slurm", "no launcher 'Slurm'. Did you mean 'slurm'? There are local, multi_gpu, slurm, ray, dummy"),
        ("kubernetes", "no launcher 'kubernetes'. There are local, multi_gpu, slurm, ray, dummy"),
        ("", "no launcher ''. There are local, multi_gpu, slurm, ray, dummy"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(name: str, says: str) -> None:
    with pytest.raises(UsageError) as refusal:
        find_launcher(name, "embedded")
    assert str(refusal.value).startswith(says)


def test_installed_packages_are_named_too(own: Own) -> None:
    own(print)
    with pytest.raises(UsageError, match="Did you mean 'my_cluster'?.*, dummy, my_cluster"):
        find_launcher("my_clustre", "embedded")


# --- commands --------------------------------------------------------------------------------------------------------


def test_dummy_prints_commands_by_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "a sweep's folder"
    jobs = plan(root, "ERM", "KD")
    before = sorted(root.rglob("*"))
    assert launch(find_launcher("dummy", "embedded"), root, jobs) is None
    lines = capfd.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("# ")]
    assert read_jobs_of(commands) == [job.folder for job in jobs]  # teachers first
    n_teachers = sum(job.stage != "student" for job in jobs)
    assert [line for line in lines if line.startswith("# ")] == [
        f"# ERM teacher: {n_teachers}", f"# student: {len(jobs) - n_teachers}"
    ]  # fmt: skip
    assert sorted(root.rglob("*")) == before
    # Of a student, with its teacher on the way. What is done is not printed again.
    assert do_command(commands[-1]) == 0
    done = {job.folder for job in jobs if is_done(root / job.folder)}
    assert done == {jobs[-1].folder, *jobs[-1].needs}
    launch(find_launcher("dummy", "embedded"), root, jobs)
    lines = capfd.readouterr().out.splitlines()
    left = read_jobs_of([line for line in lines if not line.startswith("# ")])
    assert left == [job.folder for job in jobs if job.folder not in done]


def test_command_says_how_many_threads(tmp_path: Path) -> None:
    job = plan(tmp_path)[0]
    assert shlex.split(make_command(tmp_path, job, 3))[-2:] == ["--threads", "3"]


def test_entry_point_is_given_a_stage_at_a_time(tmp_path: Path, own: Own) -> None:
    jobs = plan(tmp_path, "DAFT")
    stages: list[list[str]] = []

    def run(commands: list[str]) -> None:
        stages.append(read_jobs_of(commands))
        assert all(do_command(command) == 0 for command in commands)

    assert launch(own(run), tmp_path, jobs) == {}
    assert stages == [
        [job.folder for job in jobs if job.stage == stage] for stage in ("erm_teacher", "aft_teacher", "student")
    ]
    assert all(is_done(tmp_path / job.folder) for job in jobs)
    # Again: there is nothing to do, and nobody is troubled.
    assert launch(own(run), tmp_path, jobs) == {}
    assert len(stages) == 3


def test_launcher_may_return_before_the_jobs_end(tmp_path: Path, own: Own) -> None:
    """And its queue may run them in any order: a student trains the teacher that it misses."""
    jobs = plan(tmp_path, "KD")
    queue: list[str] = []
    run = own(queue.extend)
    assert launch(run, tmp_path, jobs) is None
    assert read_jobs_of(queue) == [job.folder for job in jobs]
    assert [do_command(command) for command in reversed(queue)] == [0] * len(jobs)
    assert launch(run, tmp_path, jobs) == {}
    assert len(queue) == len(jobs)


def test_failures_are_returned(tmp_path: Path, own: Own) -> None:
    jobs = plan(tmp_path, "ERM", "KD", user={"teacher_weights": "nowhere.pt"})

    def run(commands: list[str]) -> None:
        for command in commands:
            do_command(command)

    failures = launch(own(run), tmp_path, jobs)
    assert failures is not None
    assert failures.keys() == {job.folder for job in jobs if job.args.algorithm == "KD" or job.stage == "erm_teacher"}
    for job in jobs:
        if job.needs:
            assert failures[job.folder] == f"its teacher {job.needs[0]} failed"
        elif job.folder in failures:
            assert "nowhere.pt" in failures[job.folder]


def test_failures_of_an_earlier_launch_are_forgotten(tmp_path: Path, own: Own) -> None:
    """They are neither this launch's, nor do they keep its students from waiting for their teachers."""
    jobs = plan(tmp_path, "KD")
    for job in jobs:
        write_failure(tmp_path / job.folder, "no luck")
    queue: list[str] = []
    assert launch(own(queue.extend), tmp_path, jobs) is None
    assert not list(tmp_path.rglob("failed"))
    assert [do_command(command) for command in reversed(queue)] == [0] * len(jobs)


def test_signal_does_not_wait_for_a_launcher_that_never_asks(tmp_path: Path, own: Own) -> None:
    jobs = plan(tmp_path, "KD")
    stages = []

    def run(commands: list[str]) -> None:
        stages.append(len(commands))
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it goes on")

    with stopping.listening(signal.SIGTERM), pytest.raises(Stopped, match="the same command does the rest"):
        launch(own(run), tmp_path, jobs)
    assert stages == [3]


# --- DomainBed's -----------------------------------------------------------------------------------------------------


@pytest.fixture
def registry() -> dict[str, Any]:
    """The launchers of the user's clone of DomainBed."""
    if not os.environ.get("DOMAINBED_ROOT"):
        pytest.skip("DOMAINBED_ROOT is not set: no clone of DomainBed")
    host = contract.find_host("upstream")
    plugin.unregister(host)
    return importlib.import_module("domainbed.command_launchers").REGISTRY  # type: ignore[no-any-return]


def test_registry_of_domainbed_is_known_with_its_host(
    tmp_path: Path, registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry, "my_rack", registry["local"])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    jobs = plan(tmp_path)[:1]
    assert launch(find_launcher("my_rack", "upstream"), tmp_path, jobs) == {}
    assert is_done(tmp_path / jobs[0].folder)
    with pytest.raises(UsageError, match="no launcher 'my_rack'"):
        find_launcher("my_rack", "embedded")


def test_ours_go_before_those_of_the_same_name(registry: dict[str, Any]) -> None:
    from daft_domainbed.launch.local import run_local

    assert find_launcher("local", "upstream") is run_local
