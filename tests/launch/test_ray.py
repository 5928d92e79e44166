"""A sweep on a real Ray, started on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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

ray = pytest.importorskip("ray", reason="Ray is not installed: tools/install_services.sh brings it")
pytestmark = pytest.mark.slow

TINY = {"batch_size": 8, "backbone": "resnet8_w2", "teacher_backbone": "resnet8_w4"}


class Silence:
    """An observer that is told everything and does nothing."""

    def start(self, job: Job) -> None: ...
    def advance(self, job: Job, step: int, n_steps: int) -> None: ...
    def end(self, job: Job, failure: str | None, seconds: float) -> None: ...


@pytest.fixture
def cluster() -> Iterator[str]:
    """A Ray cluster of this machine, as a person would have one running; its address."""
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    address = context.address_info["gcs_address"]
    yield address
    ray.shutdown()


def plan(root: Path, steps: int = 6, **user: Any) -> list[Job]:
    """All stages of ERM and DAFT with Debug28's first domain held out: four jobs."""
    sweep = SweepArgs(
        datasets=["Debug28"],
        algorithms=["ERM", "DAFT"],
        output_dir=str(root),
        n_trials=1,
        n_hparams=1,
        single_test_envs=True,
        steps=steps,
        checkpoint_freq=2,
        hparams=json.dumps(TINY | user),
        device="cpu",
    )
    return [job for job in make_plan(sweep) if job.args.test_envs == [0]]


def read_weights(root: Path, jobs: list[Job]) -> list[bytes]:
    from daft_domainbed.models import weights

    models = [weights.load(root / job.folder / "model.pkl")["model_dict"] for job in jobs]
    return [b"".join(weight.numpy().tobytes() for weight in model.values()) for model in models]


def wait_until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def test_same_numbers_as_local_and_nothing_left_behind(tmp_path: Path) -> None:
    jobs = plan(tmp_path / "ray")
    assert run_ray(tmp_path / "ray", jobs, Options(n_jobs=2), Silence()) == {}
    local = plan(tmp_path / "local")
    assert run_local(tmp_path / "local", local, Options(n_jobs=2), Silence()) == {}
    assert read_weights(tmp_path / "ray", jobs) == read_weights(tmp_path / "local", local)
    assert not ray.is_initialized()
    assert not list(Path("/tmp").glob(f"daft_ray_{os.getpid()}_*"))
    # With everything done, none is started.
    assert run_ray(tmp_path / "ray", jobs, Options(ray_address="nowhere:1"), Silence()) == {}


class Killer(Silence):
    """Kills the first job's process once, at its first report."""

    def __init__(self, root: Path) -> None:
        self.root, self.killed = root, 0

    def advance(self, job: Job, step: int, n_steps: int) -> None:
        if not self.killed and step < n_steps:
            lock = json.loads((self.root / job.folder / ".lock").read_text())
            os.kill(lock["pid"], signal.SIGKILL)
            self.killed += 1


def test_a_lost_worker_s_job_goes_on_in_another(tmp_path: Path) -> None:
    jobs = [job for job in plan(tmp_path / "ray", steps=3000) if job.stage == "student" and job.args.algorithm == "ERM"]
    killer: Observer = Killer(tmp_path / "ray")
    assert run_ray(tmp_path / "ray", jobs, Options(n_jobs=1), killer) == {}
    assert killer.killed == 1  # type: ignore[attr-defined]
    assert "going on at step" in (tmp_path / "ray" / jobs[0].folder / "err.txt").read_text()


def test_a_failed_teacher_marks_its_student(tmp_path: Path) -> None:
    jobs = [job for job in plan(tmp_path, teacher_weights=str(tmp_path / "nowhere.pt")) if job.args.algorithm != "ERM"]
    jobs = [job for job in plan(tmp_path, teacher_weights=str(tmp_path / "nowhere.pt")) if job not in jobs][:1] + jobs
    failures = run_ray(tmp_path, jobs, Options(n_jobs=1), Silence())
    assert set(failures) == {job.folder for job in jobs}
    assert "nowhere.pt" in failures[jobs[0].folder]
    assert failures[jobs[-1].folder] == f"its teacher {jobs[-1].needs[0]} failed"


def test_address_without_a_cluster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--ray_address 127.0.0.1:9: no Ray cluster answers there"):
        run_ray(tmp_path, plan(tmp_path), Options(ray_address="127.0.0.1:9"), Silence())


def test_running_cluster_is_used_and_left_running(cluster: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "daft_domainbed.scripts.sweep", "launch", "--datasets", "Debug28"]
    command += ["--algorithms", "ERM", "--n_trials", "1", "--n_hparams", "1", "--single_test_envs", "--steps", "4"]
    command += ["--hparams", json.dumps({"batch_size": 8, "backbone": "resnet8_w2"}), "--skip_confirmation"]
    command += ["--command_launcher", "ray", "--ray_address", cluster, "--output_dir", str(tmp_path / "sweep")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "sweep").glob("*/done"))) == 3
    assert ray.cluster_resources()["CPU"] == 2


def test_stopping_saves(tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    command = [sys.executable, "-m", "daft_domainbed.scripts.sweep", "launch", "--datasets", "Debug28"]
    command += ["--algorithms", "ERM", "--n_trials", "1", "--n_hparams", "1", "--single_test_envs", "--steps", "20000"]
    command += ["--checkpoint_freq", "20000", "--hparams", json.dumps({"batch_size": 8, "backbone": "resnet8_w2"})]
    command += ["--skip_confirmation", "--command_launcher", "ray", "--n_jobs", "1", "--output_dir", str(root)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    launcher = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(root.glob("*/results.jsonl")))
    launcher.terminate()
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + signal.SIGTERM, errors
    assert errors.splitlines()[-1].endswith("have saved where they are; the same command goes on")
    assert not list(root.glob("*/.lock"))
