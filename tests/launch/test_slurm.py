"""Sweeps on a real Slurm of one node, and on a faked one for what a real one cannot show quickly."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.arguments import SweepArgs
from daft_domainbed.cli import run_command
from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.launch import slurm as launcher
from daft_domainbed.launch import work
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.local import run_local
from daft_domainbed.launch.options import Options
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.slurm import Element, list_queued, submit_slurm
from daft_domainbed.launch.states import read_failure
from daft_domainbed.launch.work import do_job
from daft_domainbed.runtime import locks, stopping
from tests.launch.conftest import Silence, make_hold
from tests.processes import REPOSITORY, WarmPopen, wait_until
from tests.services import Slurm, find_missing

pytest.importorskip("submitit", reason="submitit is not installed: tools/install_services.sh brings it")

MISSING = find_missing()
TINY = {"batch_size": 8, "backbone": "resnet8_w2"}

Outcome = Callable[[Path], dict[str, str]]


def plan(root: Path, *algorithms: str, n_trials: int = 1, steps: int = 6, **user: Any) -> list[Job]:
    """All stages of some algorithms on Debug28, with each of its three domains held out."""
    teachers = {"teacher_backbone": "resnet8_w4"} if algorithms != ("ERM",) else {}
    sweep = SweepArgs(
        datasets=["Debug28"],
        algorithms=list(algorithms),
        output_dir=str(root),
        n_trials=n_trials,
        n_hparams=1,
        single_test_envs=True,
        steps=steps,
        checkpoint_freq=steps // 3,
        hparams=json.dumps(TINY | teachers | user),
        device="cpu",
    )
    return make_plan(sweep)


def submit(root: Path, jobs: list[Job], slurm: dict[str, str] | None = None, size: int = 100) -> dict[str, str] | None:
    return submit_slurm(root, jobs, Options(slurm=slurm or {}, max_array_size=size), Silence())


def run_here(root: Path, jobs: list[Job]) -> None:
    assert run_local(root, jobs, Options(n_jobs=2), Silence()) == {}


def read_logs(root: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((root / "slurm").glob("*_log.*")))


# --- a real cluster --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[Slurm]:
    if MISSING:
        pytest.skip(f"Slurm is not installed (no {', '.join(MISSING)}): tools/install_services.sh brings it")
    with Slurm() as cluster:
        yield cluster
    assert not cluster.list_processes()


@pytest.fixture
def cluster(running_cluster: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """A cluster without jobs, which is this process's for a test; what its jobs cover is not measured, to be quick."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    for name, value in running_cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield running_cluster
    running_cluster.cancel_all()


@pytest.mark.slow
@pytest.mark.usefixtures("warm_servers")
def test_same_runs_as_local_and_nothing_is_submitted_twice(
    cluster: Slurm, tmp_path: Path, outcome: Outcome, capfd: pytest.CaptureFixture[str]
) -> None:
    def choose(root: Path) -> list[Job]:
        jobs = plan(root, "ERM", "KD")
        plain = [job for job in jobs if job.args.algorithm == "ERM" and job.stage == "student"]
        return [job for job in jobs if job.args.test_envs == [0] or job in plain[:2]]

    root, local = tmp_path / "slurm", tmp_path / "local"
    jobs = choose(root)
    assert submit(root, jobs) is None
    queued = list_queued(root)
    assert set(queued) == {job.folder for job in jobs}
    assert any("_" in name for name in queued.values())  # an element of an array
    capfd.readouterr()
    assert submit(root, jobs) is None
    assert "jobs are in Slurm's queue already" in capfd.readouterr().err
    assert list_queued(root).items() <= queued.items()
    cluster.wait_until_empty()

    run_here(local, choose(local))
    for job in jobs:
        assert outcome(root / job.folder) == outcome(local / job.folder)
    assert submit(root, jobs) == {}
    # Each was started once, and neither locks nor what a submission writes on its way are left.
    assert read_logs(root).count("Starting with JobEnvironment") == len(jobs)
    assert not list(root.rglob(".*"))


def time_out(cluster: Slurm, job_id: str) -> None:
    """The signal that Slurm sends before a job's time is up."""
    cluster.call("scancel", "--signal=USR2", job_id)


def preempt(cluster: Slurm, job_id: str) -> None:
    cluster.submit("sleep 1", "--partition=high", "--cpus-per-task=2")


def lose_node(cluster: Slurm, job_id: str) -> None:
    cluster.crash_node()
    cluster.start_node()


@pytest.mark.slow
@pytest.mark.usefixtures("warm_servers")
def test_job_goes_on_whatever_happens_to_it_and_its_numbers_show_nothing_of_it(
    cluster: Slurm, tmp_path: Path, outcome: Outcome
) -> None:
    root, whole = tmp_path / "slurm", tmp_path / "whole"
    (job,) = plan(root, "ERM", steps=9)[:1]
    # Each start waits at its second step for what is to happen to it.
    (tmp_path / "hold.py").write_text(make_hold(tmp_path, "ERM", 2, times=4))
    jobs = [replace(job, imports=[str(tmp_path / "hold.py")])]
    folder = root / job.folder

    def wait_for_start(number: int) -> str:
        """Wait until it is held for that time, and return its name in Slurm."""
        wait_until(lambda: len(list(tmp_path.glob("held-*"))) == number, f"start {number}")
        assert read_logs(root).count("Starting with JobEnvironment") == number
        return list_queued(root)[job.folder]

    assert submit(root, jobs, {"partition": "low"}) is None
    for number, disturb in enumerate((time_out, preempt, lose_node), 1):
        disturb(cluster, wait_for_start(number))
    job_id = wait_for_start(4)
    assert (folder / "err.txt").read_text().count("going on at step") == 3

    # It outlives the daemon of its node.
    cluster.kill_node_daemon()
    cluster.start_node()
    wait_until(lambda: cluster.list_jobs() == {job_id: "RUNNING"}, "the node's daemon knows its job")

    # Cancelled, it saves, and is not requeued until the next launch.
    cluster.call("scancel", job_id)
    cluster.wait_until_empty()
    assert f"{job.folder}: stopped." in read_logs(root)
    assert not (folder / "done").exists()
    assert not (folder / ".lock").exists()
    assert submit(root, jobs) is None
    cluster.wait_until_empty()

    run_here(whole, plan(whole, "ERM", steps=9)[:1])
    assert outcome(folder) == outcome(whole / job.folder) | {"err.txt": "there"}


@pytest.mark.slow
def test_options_are_slurm_s_to_judge(cluster: Slurm, tmp_path: Path) -> None:
    jobs = plan(tmp_path, "ERM")[:2]
    refused = "sbatch refuses the options: "
    for option, error, message in (
        ("partiton=low", UsageError, f"{refused}unrecognized option '--partiton=low'; 'sbatch --help' lists"),
        ("mem=lots", UsageError, f"{refused}Invalid --mem specification"),
        ("gres=gpu:1", UsageError, rf"{refused}Invalid generic resource \(gres\) specification"),
        ("partition=nowhere", RunError, "Slurm refuses 2 students: .*Invalid partition name specified"),
    ):
        key, _, value = option.partition("=")
        with pytest.raises(error, match=message):
            submit(tmp_path, jobs, {key: value})
    assert list((tmp_path / "slurm").iterdir()) == []
    assert submit(tmp_path, jobs, {"hold": "true", "comment": "two words", "job_name": "mine"}) is None
    shown = cluster.call("squeue", "--noheader", "--Format=name:20,comment:20,reason:20")
    assert shown.split() == ["mine", "two", "words", "JobHeldUser"]


@pytest.mark.slow
def test_failed_teacher_marks_its_student(cluster: Slurm, tmp_path: Path) -> None:
    jobs = plan(tmp_path, "KD", teacher_weights=str(tmp_path / "nowhere.pt"))
    teacher, student = (next(job for job in jobs if job.stage == stage) for stage in ("erm_teacher", "student"))
    assert student.needs == [teacher.folder]
    assert submit(tmp_path, [teacher, student]) is None
    cluster.wait_until_empty()
    assert "nowhere.pt" in read_failure(tmp_path / teacher.folder)
    assert read_failure(tmp_path / student.folder) == f"its teacher {teacher.folder} failed"
    assert read_logs(tmp_path).count("Exited with exit code 1") == 2  # as Slurm's own tools show it, too
    assert submit(tmp_path, [teacher, student]) is None
    assert not (tmp_path / teacher.folder / "failed").exists()  # tried again


# --- a faked scheduler -----------------------------------------------------------------------------------------------

FAKE = """#!{python} -ES
import json, os, pathlib, re, sys
here = pathlib.Path(__file__).parent
name, arguments = pathlib.Path(__file__).name, sys.argv[1:]
with (here / "calls").open("a") as file:
    file.write(json.dumps([name, *arguments]) + "\\n")
if name == "sbatch":
    number = len(list(here.glob("*.sh"))) + 1
    if (here / "refusal").exists() and number > 1:
        sys.exit((here / "refusal").read_text())
    script = pathlib.Path(arguments[0]).read_text()
    if "--partiton" in script:
        sys.exit("sbatch: unrecognized option '--partiton=gpu'\\nTry 'sbatch --help' for more information")
    (here / f"{{number}}.sh").write_text(script)
    (here / "environment").write_text(json.dumps(dict(os.environ)))
    array = re.search("--array=0-([0-9]+)", script)
    elements = [f"{{number}}_{{i}}" for i in range(int(array[1]) + 1)] if array else [str(number)]
    with (here / "queue").open("a") as file:
        file.writelines(f"{{element}}\\n" for element in elements)
    print(f"Submitted batch job {{number}}")
elif name == "squeue":
    if (here / "outage").exists():
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
    print((here / ("state" if "--format=%T" in arguments else "queue")).read_text())
"""


@dataclass
class Fake:
    """A scheduler that takes every job and runs none.

    Attributes:
        folder: Its scripts, what they were called with (`calls`), the `queue`; a file `refusal` has sbatch refuse all
            but the first, `outage` has squeue fail.
    """

    folder: Path

    def read_scripts(self) -> list[dict[str, str]]:
        """Return the options of each array that was submitted."""
        paths = sorted(self.folder.glob("*.sh"), key=lambda path: int(path.stem))
        return [dict(re.findall("(?m)^#SBATCH --([a-z-]+)(?:=(.*))?$", path.read_text())) for path in paths]

    def read_calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "squeue", "srun", "scontrol"):
        (folder / name).write_text(FAKE.format(python=sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Fake(folder)


def test_stages_are_arrays_that_wait_for_what_they_need(fake: Fake, tmp_path: Path) -> None:
    jobs = plan(tmp_path / "sweep", "ERM", "KD", n_trials=3)
    assert submit(tmp_path / "sweep", jobs, size=4) is None
    scripts = fake.read_scripts()
    arrays = [(script["job-name"], script.get("array"), script.get("dependency")) for script in scripts]
    assert arrays == [
        ("daft-erm_teacher", "0-3%4", None),
        ("daft-erm_teacher", "0-3%4", None),
        ("daft-erm_teacher", None, None),
        # Plain ERM needs no teacher.
        ("daft-student", "0-3%4", None),
        ("daft-student", "0-3%4", None),
        ("daft-student", None, None),
        # KD waits only for the array that its own teachers are in.
        ("daft-student", "0-3%4", "afterany:1"),
        ("daft-student", "0-3%4", "afterany:2"),
        ("daft-student", None, "afterany:3"),
    ]
    submissions = json.loads((tmp_path / "sweep/slurm/jobs.json").read_text())["submissions"]
    places = {folder: entry["job_id"] for entry in submissions for folder in entry["folders"]}
    assert set(places) == {job.folder for job in jobs}
    for job in jobs:
        for need in job.needs:
            assert scripts[int(places[job.folder]) - 1]["dependency"] == f"afterany:{places[need]}"


def test_only_what_has_left_the_queue_is_submitted_again(fake: Fake, tmp_path: Path) -> None:
    jobs = plan(tmp_path / "sweep", "KD")
    assert submit(tmp_path / "sweep", jobs) is None
    teachers = [job for job in jobs if job.stage == "erm_teacher"]
    students = {job.needs[0]: job for job in jobs if job.stage == "student"}
    (fake.folder / "queue").write_text("1_0\n1_2\n9_0\n")
    assert list_queued(tmp_path / "sweep") == {teachers[0].folder: "1_0", teachers[2].folder: "1_2"}
    assert submit(tmp_path / "sweep", jobs) is None
    submissions = json.loads((tmp_path / "sweep/slurm/jobs.json").read_text())["submissions"]
    assert [entry["folders"] for entry in submissions[2:]] == [
        [teachers[1].folder],
        [students[teachers[0].folder].folder, students[teachers[2].folder].folder],
        [students[teachers[1].folder].folder],
    ]
    assert [script.get("dependency") for script in fake.read_scripts()[2:]] == [None, "afterany:1", "afterany:3"]


def test_silent_squeue_is_not_taken_for_an_empty_queue(fake: Fake, tmp_path: Path) -> None:
    jobs = plan(tmp_path / "sweep", "ERM")
    assert submit(tmp_path / "sweep", jobs) is None
    (fake.folder / "outage").touch()
    with pytest.raises(RunError, match="squeue cannot say what is in the queue: .*Unable to contact slurm controller"):
        submit(tmp_path / "sweep", jobs)
    assert len(fake.read_scripts()) == 1


def test_two_launches_at_once_submit_each_job_once(fake: Fake, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "daft_domainbed.scripts.sweep", "launch", "--command_launcher", "slurm"]
    command += ["--datasets", "Debug28", "--algorithms", "ERM", "KD", "--n_trials", "3", "--n_hparams", "1"]
    command += ["--single_test_envs", "--max_array_size", "2", "--skip_confirmation"]
    command += ["--output_dir", str(tmp_path / "sweep"), "--hparams", json.dumps(TINY)]
    with ExitStack() as stack:
        logs = [stack.enter_context((tmp_path / f"log{i}").open("w+")) for i in range(2)]
        launches = [WarmPopen(command, stderr=log) for log in logs]
        statuses = [launch.wait(300) for launch in launches]
        errors = [(tmp_path / f"log{i}").read_text() for i in range(2)]
    assert statuses == [0, 0], errors
    submissions = json.loads((tmp_path / "sweep/slurm/jobs.json").read_text())["submissions"]
    folders = [folder for entry in submissions for folder in entry["folders"]]
    assert len(folders) == len(set(folders)) == 27
    assert "27 jobs are in Slurm's queue already" in "".join(errors)


def test_options_reach_sbatch(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = plan(tmp_path / "sweep", "ERM")[:2]
    slurm = {"partition": "gpu", "--mem": "16G", "slurm_account": "me", "time": "1-06:30", "setup": "module load cuda"}
    options = Options(threads=4, n_jobs=1, slurm=slurm | {"reservation": "night", "reboot": "true"})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    assert submit_slurm(tmp_path / "sweep", jobs, options, Silence()) is None
    (script,) = fake.read_scripts()
    expected = {"partition": "gpu", "mem": "16G", "account": "me", "time": "1830", "reservation": "night", "reboot": ""}
    expected |= {"cpus-per-task": "4", "array": "0-1%1", "signal": "USR2@300", "requeue": ""}
    assert script.items() >= expected.items()
    assert "gpus-per-node" not in script
    text = (fake.folder / "1.sh").read_text()
    assert "\nexport OMP_NUM_THREADS=4\nmodule load cuda\n" in text
    assert "--cpus-per-task=4 " in text.partition("\nsrun ")[2]
    # What the job around this process was given is not the new one's.
    there = json.loads((fake.folder / "environment").read_text())
    assert not {"SLURM_JOB_ID", "SLURM_MEM_PER_CPU"} & set(there)
    assert os.environ["SLURM_MEM_PER_CPU"] == "1"


@pytest.mark.parametrize(("slurm", "asked"), [({}, "gpus-per-node=1"), ({"gres": "gpu:a100:1"}, "gres=gpu:a100:1")])
def test_a_gpu_is_asked_for_where_the_sweep_says_cuda(
    fake: Fake, tmp_path: Path, slurm: dict[str, str], asked: str
) -> None:
    (job, *_) = plan(tmp_path / "sweep", "ERM")
    assert submit(tmp_path / "sweep", [replace(job, args=replace(job.args, device="cuda"))], slurm) is None
    (script,) = fake.read_scripts()
    assert [f"{key}={value}" for key, value in script.items() if key in ("gres", "gpus-per-node")] == [asked]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("array=0-3", "that is set by the launcher itself"),
        ("open-mode=append", "that is set by the launcher itself"),
        ("time=tomorrow", "write minutes, hours:minutes:seconds or days-hours:minutes:seconds"),
        ("time=0", "has to be a minute or more"),
        ("cpus_per_task=two", "has to be a whole number from 1 on"),
        ("mem=", "the value is missing"),
    ],
)
def test_bad_option_is_refused(fake: Fake, tmp_path: Path, option: str, message: str) -> None:
    key, _, value = option.partition("=")
    with pytest.raises(UsageError) as caught:
        submit(tmp_path / "sweep", plan(tmp_path / "sweep", "ERM"), {key: value})
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--slurm {key.replace('-', '_')}=")
    assert not (tmp_path / "sweep").exists()


def test_option_that_sbatch_does_not_have_is_refused_in_its_own_words(
    fake: Fake, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["launch", "--command_launcher", "slurm", "--datasets", "Debug28", "--algorithms", "ERM", "--n_trials", "1"]
    argv += ["--n_hparams", "1", "--single_test_envs", "--skip_confirmation", "--hparams", json.dumps(TINY)]
    argv += ["--output_dir", str(tmp_path / "sweep")]
    assert run_command("sweep", [*argv, "--slurm", "partiton=gpu"]) == 2
    refusal = (
        "--slurm: sbatch refuses the options: unrecognized option '--partiton=gpu'; 'sbatch --help' lists those it has"
    )
    assert capfd.readouterr().err.splitlines()[-1].endswith(refusal)
    assert fake.read_scripts() == []
    assert list((tmp_path / "sweep/slurm").iterdir()) == []
    # Nothing stands in the way of the option that was meant.
    assert run_command("sweep", [*argv, "--slurm", "partition=gpu"]) == 0
    assert [script["partition"] for script in fake.read_scripts()] == ["gpu"]


def test_sbatch_s_refusal_is_passed_on_in_one_line(
    fake: Fake, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (fake.folder / "refusal").write_text(
        "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates policy"
    )
    argv = ["launch", "--command_launcher", "slurm", "--datasets", "Debug28", "--algorithms", "KD", "--n_trials", "1"]
    argv += ["--n_hparams", "1", "--single_test_envs", "--skip_confirmation", "--hparams", json.dumps(TINY)]
    assert run_command("sweep", [*argv, "--output_dir", str(tmp_path / "sweep")]) == 1
    errors = capfd.readouterr().err.splitlines()
    assert errors[-2] == "submitted 3 ERM teachers as Slurm job 1"
    assert errors[-1].endswith(
        "Slurm refuses 3 students: QOSMaxSubmitJobPerUserLimit Batch job submission failed: Job violates policy"
    )
    # What it took is remembered, what it refused leaves nothing behind.
    assert len(list_queued(tmp_path / "sweep")) == 3
    assert len(list((tmp_path / "sweep/slurm").iterdir())) == 3 + 1 + 1


def test_where_slurm_or_submitit_is_missing_says_what_to_do(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = plan(tmp_path / "sweep", "ERM")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        with pytest.raises(UsageError, match=r"pip install 'daft-domainbed\[slurm\]'"):
            submit(tmp_path / "sweep", jobs)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="there is no sbatch here; launch where Slurm's commands are"):
        submit(tmp_path / "sweep", jobs)


@pytest.fixture
def element(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Element]:
    """A job as in an array of Slurm's, for this process to do; signal handlers are put back."""
    (job, *_) = plan(tmp_path / "sweep", "ERM")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    with stopping.listening():
        yield Element(tmp_path / "sweep", job, 1)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
@pytest.mark.parametrize(("state", "is_requeued"), [("RUNNING", True), ("COMPLETING", False), ("", False)])
def test_stopped_job_is_requeued_while_slurm_counts_it_as_running(
    fake: Fake, element: Element, monkeypatch: pytest.MonkeyPatch, number: int, state: str, is_requeued: bool
) -> None:
    class Requeued(Exception):
        pass

    def requeue(*args: object) -> None:
        raise Requeued

    def warn(job: Job, **kwargs: object) -> Any:
        for _ in range(3):  # as often as Slurm likes
            signal.raise_signal(number)
        return do_job(element.root, job, threads=1)

    signal.signal(signal.SIGUSR2, requeue)  # in submitit's place
    monkeypatch.setattr(work, "do_job", lambda root, job, **kwargs: warn(job))
    (fake.folder / "state").write_text(state)
    with pytest.raises(Requeued if is_requeued else SystemExit) as caught:
        element()
    assert is_requeued or caught.value.args == (128 + signal.SIGTERM,)
    folder = element.root / element.job.folder
    assert (folder / "resume.pt").is_file()
    assert not (folder / "done").exists()


def test_job_that_never_gets_anywhere_is_given_up(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "MOST_TIMEOUTS", 0)
    (tmp_path / "hold.py").write_text(make_hold(tmp_path, "ERM", 2))
    jobs = [replace(plan(tmp_path / "sweep", "ERM")[0], imports=[str(tmp_path / "hold.py")])]
    assert submit(tmp_path / "sweep", jobs, {"time": "1"}) is None
    (fake.folder / "state").write_text("RUNNING")
    environment = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "submitit.core._submit", str(tmp_path / "sweep/slurm")]
    with (tmp_path / "output").open("w") as file:
        job = WarmPopen(command, env=os.environ | environment, stdout=file)
    try:
        wait_until(lambda: list(tmp_path.glob("held-*")) or job.poll() is not None, "the job has begun")
        job.send_signal(signal.SIGUSR2)  # its minute is nearly over
        status = job.wait(120)
    finally:
        job.kill()
    output = (tmp_path / "output").read_text()
    assert status == 1, output
    assert "Job not requeued because: timed-out too many times." in output
    assert not any(call[0] == "scontrol" for call in fake.read_calls())


def test_requeued_job_waits_until_its_predecessor_is_known_to_be_dead(
    element: Element, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = element.root / element.job.folder
    folder.mkdir(parents=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with ExitStack() as predecessor:
        predecessor.enter_context(locks.claim(folder))
        looks: list[float] = []

        def sleep(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 50:
                predecessor.close()

        monkeypatch.setattr(time, "sleep", sleep)
        element()
    assert (folder / "done").is_file()


def test_job_that_another_process_is_at_is_left_to_it(element: Element, capsys: pytest.CaptureFixture[str]) -> None:
    folder = element.root / element.job.folder
    folder.mkdir(parents=True)
    with locks.claim(folder):
        element()
    assert "busy" in capsys.readouterr().out
    assert not (folder / "results.jsonl").exists()
