"""A sweep on a real Ray, started on this machine."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.arguments import SweepArgs
from daft_domainbed.errors import UsageError
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.local import run_local
from daft_domainbed.launch.options import Options
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.ray import run_ray
from daft_domainbed.launch.schedule import Observer
from tests.conftest import HPARAMS, TEACHER_HPARAMS
from tests.launch.conftest import Silence, make_hold
from tests.processes import REPOSITORY, WarmPopen, wait_until
from tests.states import preserving

pytest.importorskip("ray", reason="Ray is not installed: tools/install_services.sh brings it")
pytestmark = pytest.mark.slow

Outcome = Callable[[Path], dict[str, str]]
StartScript = Callable[..., WarmPopen]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Options]:
    """A Ray cluster of this machine, as a person would have one running, and how a sweep is launched there."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-")  # the path of a socket has to be short
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    cluster = Cluster(True, head_node_args={"num_cpus": 2, "include_dashboard": False, "temp_dir": folder})
    yield Options(n_jobs=2, ray_address=cluster.address)
    assert cluster.head_node.remaining_processes_alive()
    with preserving():
        cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def plan(root: Path, *algorithms: str, **user: Any) -> list[Job]:
    """All stages of some algorithms with Debug28's first domain held out."""
    sweep = SweepArgs(
        datasets=["Debug28"],
        algorithms=list(algorithms),
        output_dir=str(root),
        n_trials=1,
        n_hparams=1,
        single_test_envs=True,
        steps=6,
        checkpoint_freq=2,
        hparams=json.dumps(HPARAMS | (TEACHER_HPARAMS if algorithms != ("ERM",) else {}) | user),
        device="cpu",
    )
    return [job for job in make_plan(sweep) if job.args.test_envs == [0]]


@pytest.fixture
def launch(tmp_path: Path, start_script: StartScript) -> Callable[..., tuple[int, dict[str, str]]]:
    """Launches in a process of its own, which Ray changes; returns its number and the failures."""

    def run(root: Path, jobs: list[Job], options: Options, observer: Observer) -> tuple[int, dict[str, str]]:
        (tmp_path / "call").write_bytes(pickle.dumps((root, jobs, options, observer)))
        with (tmp_path / "log").open("w") as log:
            process = start_script(
                f"""
import json, pickle
from pathlib import Path
from daft_domainbed.launch.ray import run_ray
place = Path({str(tmp_path)!r})
(place / "failures").write_text(json.dumps(run_ray(*pickle.loads((place / "call").read_bytes()))))
""",
                stderr=log,
            )
        assert process.wait(300) == 0, (tmp_path / "log").read_text()
        return process.pid, json.loads((tmp_path / "failures").read_text())

    return run


@pytest.mark.usefixtures("warm_servers")
def test_same_numbers_as_local_and_nothing_left_behind(
    launch: Callable[..., tuple[int, dict[str, str]]], tmp_path: Path, outcome: Outcome
) -> None:
    jobs = plan(tmp_path / "ray", "ERM", "KD")
    launcher, failures = launch(tmp_path / "ray", jobs, Options(n_jobs=2), Silence())
    assert failures == {}
    local = plan(tmp_path / "local", "ERM", "KD")
    assert run_local(tmp_path / "local", local, Options(n_jobs=2), Silence()) == {}
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "local")
    assert not list(Path(tempfile.gettempdir()).glob(f"daft_ray_{launcher}_*"))
    # With everything done, none is started.
    assert run_ray(tmp_path / "ray", jobs, Options(ray_address="nowhere:1"), Silence()) == {}


class Killer(Silence):
    """Kills the process of the job that is held, once."""

    def __init__(self, place: Path) -> None:
        self.place, self.has_killed = place, False

    def advance(self, job: Job, step: int, n_steps: int) -> None:
        if not self.has_killed:
            wait_until(lambda: list(self.place.glob("held-*")))
            (held,) = self.place.glob("held-*")
            os.kill(int(held.name.partition("-")[2]), signal.SIGKILL)
            self.has_killed = True


def test_a_lost_worker_s_job_goes_on_in_another_and_a_failed_teacher_marks_its_student(
    cluster: Options, launch: Callable[..., tuple[int, dict[str, str]]], tmp_path: Path
) -> None:
    root = tmp_path / "ray"
    (job,) = plan(root, "ERM")
    (tmp_path / "hold.py").write_text(make_hold(tmp_path, "ERM", 4, until="False", times=1))
    held = replace(job, imports=[str(tmp_path / "hold.py")])
    teacher, student = plan(root, "KD", teacher_weights=str(tmp_path / "nowhere.pt"))
    _, failures = launch(root, [held, teacher, student], cluster, Killer(tmp_path))
    assert "going on at step" in (root / job.folder / "err.txt").read_text()
    assert set(failures) == {teacher.folder, student.folder}
    assert "nowhere.pt" in failures[teacher.folder]
    assert failures[student.folder] == f"its teacher {teacher.folder} failed"


def test_address_without_a_cluster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--ray_address 127.0.0.1:9: no Ray cluster answers there"):
        run_ray(tmp_path, plan(tmp_path, "ERM"), Options(ray_address="127.0.0.1:9"), Silence())


def test_stopping_saves_and_leaves_a_running_cluster_alone(
    cluster: Options, tmp_path: Path, start_script: StartScript
) -> None:
    root, path = tmp_path / "sweep", tmp_path / "log"
    argv = ["launch", "--datasets", "Debug28", "--algorithms", "ERM", "--n_trials", "1", "--n_hparams", "1"]
    argv += ["--single_test_envs", "--steps", "100000", "--checkpoint_freq", "100000", "--hparams", json.dumps(HPARAMS)]
    argv += ["--skip_confirmation", "--command_launcher", "ray", "--n_jobs", "1", "--output_dir", str(root)]
    code = f"""
import sys
from daft_domainbed.cli import run_command
sys.exit(run_command("sweep", {[*argv, "--ray_address", cluster.ray_address]!r}))
"""
    with path.open("w") as log:
        launcher = start_script(code, stderr=log)
    wait_until(lambda: list(root.glob("*/results.jsonl")) or launcher.poll() is not None)
    launcher.terminate()
    assert launcher.wait(120) == 128 + signal.SIGTERM, path.read_text()
    assert path.read_text().splitlines()[-1].endswith("have saved where they are; the same command goes on")
    assert not list(root.glob("*/.lock"))
    assert len(list(root.glob("*/resume.pt"))) == 1
