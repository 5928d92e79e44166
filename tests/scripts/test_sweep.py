"""The command `sweep`, from the first launch to the last, with everything that may come in between."""

from __future__ import annotations

import io
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.cli import run_command
from daft_domainbed.launch import launchers, progress, work
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.plan_file import read_jobs, read_sweep_args, write_plan
from daft_domainbed.launch.states import read_states, write_failure
from daft_domainbed.runtime.layout import PLAN_FILE
from daft_domainbed.runtime.locks import claim
from tests.conftest import HPARAMS, TEACHER_HPARAMS
from tests.launch.conftest import make_hold, make_sweep, run_here
from tests.processes import WarmPopen, list_group, wait_until

TINY = json.dumps(HPARAMS)
TINY_TEACHER = json.dumps(HPARAMS | TEACHER_HPARAMS)
ERM = ["--datasets", "Debug28", "--algorithms", "ERM", "--hparams", TINY]
KD = ["--datasets", "Debug28", "--algorithms", "ERM", "KD", "--hparams", TINY_TEACHER]
SMALL = ["--n_trials", "1", "--n_hparams", "1", "--single_test_envs", "--steps", "4", "--checkpoint_freq", "2"]
SMALL += ["--device", "cpu"]

Outcome = Callable[[Path], dict[str, str]]
StartScript = Callable[..., WarmPopen]
Start = Callable[..., WarmPopen]
Capture = pytest.CaptureFixture[str]


class Sweep:
    """The command for one folder, with a launcher that does all in this process."""

    def __init__(self, root: Path, capfd: Capture) -> None:
        self.root, self.capfd = root, capfd

    def __call__(self, command: str, *argv: str) -> tuple[int, str, list[str]]:
        """Return the exit status, standard output, and the lines of standard error."""
        self.capfd.readouterr()
        status = run_command("sweep", [command, "--output_dir", str(self.root), *argv])
        out, err = self.capfd.readouterr()
        return status, out, err.splitlines()

    def launch(self, *argv: str) -> None:
        status, _, lines = self("launch", "--command_launcher", "here", "--skip_confirmation", *argv)
        assert status == 0, lines

    def refuse(self, command: str, *argv: str) -> str:
        """Return the line by which a command is refused; nothing may have been written."""
        before = read_tree(self.root.parent)
        status, _, lines = self(command, *argv)
        assert status == 2, lines
        assert read_tree(self.root.parent) == before
        assert "daft-domainbed sweep: " in lines[-1]
        return lines[-1]

    @property
    def jobs(self) -> list[Job]:
        return read_jobs(self.root)

    def count(self) -> dict[str, int]:
        """How many jobs are in each state."""
        kinds = [state.kind for state in read_states(self.root, self.jobs).values()]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def read_tree(root: Path) -> dict[Path, int]:
    """Return all files with their times, but for the locks, whose times are signs of life."""
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def sweep(tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep yet to be launched, in a folder of its own."""
    monkeypatch.setitem(launchers._BUILT_IN, "here", lambda: run_here)
    monkeypatch.setitem(launchers._BUILT_IN, "later", lambda: lambda *_: None)  # plans, and runs nothing
    monkeypatch.chdir(tmp_path)
    return Sweep(tmp_path / "sweep", capfd)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished sweeps of ERM and of KD that nothing disturbed; not to be written to."""
    roots = {name: tmp_path_factory.mktemp(name) for name in ("ERM", "KD")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(launchers._BUILT_IN, "here", lambda: run_here)
        for flags, root in ((ERM, roots["ERM"]), (KD, roots["KD"])):
            argv = ["launch", "--output_dir", str(root), "--command_launcher", "here", "--skip_confirmation"]
            assert run_command("sweep", [*argv, *flags, *SMALL]) == 0
    return roots


@pytest.fixture
def reference(finished: dict[str, Path]) -> Path:
    return finished["KD"]


@pytest.fixture
def erm_sweep(sweep: Sweep, finished: dict[str, Path]) -> Sweep:
    """A finished sweep of ERM, which has moved here."""
    shutil.copytree(finished["ERM"], sweep.root)
    return sweep


@pytest.fixture
def kd_sweep(sweep: Sweep, finished: dict[str, Path]) -> Sweep:
    """A finished sweep of KD, which has moved here."""
    shutil.copytree(finished["KD"], sweep.root)
    return sweep


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def collect(root: Path, capfd: Capture) -> str:
    capfd.readouterr()
    assert run_command("collect_results", ["--input_dir", str(root), "--format", "json"]) == 0
    return capfd.readouterr().out


# --- launch, and launch again ----------------------------------------------------------------------------------------


def test_launch_then_nothing_is_left(sweep: Sweep) -> None:
    sweep.launch(*KD, *SMALL)
    assert sweep.count() == {"done": 9}
    before = read_tree(sweep.root)
    sweep.launch(*KD, *SMALL)
    del before[sweep.root / PLAN_FILE]
    assert before.items() <= read_tree(sweep.root).items()


def test_folder_alone_is_enough_to_go_on(sweep: Sweep, outcome: Outcome) -> None:
    """The flags are those that it was begun with."""
    sweep.launch(*KD, *SMALL, "--holdout_fraction", "0.3", "--seed", "7", "--precision", "bf16")
    whole, args = outcome(sweep.root), read_sweep_args(sweep.root)
    assert (args["holdout_fraction"], args["seed"], args["precision"]) == (0.3, 7, "bf16")
    kept = sweep.jobs[0].folder
    for job in sweep.jobs[1:]:
        shutil.rmtree(sweep.root / job.folder)
    before = read_tree(sweep.root / kept)
    sweep.launch()
    assert outcome(sweep.root) == whole
    assert read_tree(sweep.root / kept) == before
    assert read_sweep_args(sweep.root) == args


def test_store_and_data_folder_are_remembered(sweep: Sweep, tmp_path: Path) -> None:
    flags = ["--teachers_dir", str(tmp_path / "store"), "--data_dir", str(tmp_path), "--image_cache", str(tmp_path)]
    sweep.launch(*KD, *SMALL, *flags)
    shutil.rmtree(sweep.root / sweep.jobs[-1].folder)
    before = read_tree(tmp_path / "store")
    sweep.launch()
    assert read_tree(tmp_path / "store") == before
    assert not (sweep.root / "teachers").exists()
    assert {(job.args.data_dir, job.args.image_cache) for job in sweep.jobs} == {(str(tmp_path), str(tmp_path))}
    assert {job.args.device for job in sweep.jobs} == {"cpu"}


def test_threads_are_the_sweeps(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers may depend on them."""
    seen: list[int] = []

    def run(root: Path, jobs: Sequence[Job], options: Any, observer: Any) -> dict[str, str]:
        seen.append(options.threads)
        return run_here(root, jobs[:1])

    monkeypatch.setitem(launchers._BUILT_IN, "here", lambda: run)
    sweep.launch(*ERM, *SMALL, "--threads", "2")
    sweep.launch()
    assert seen == [2, 2]
    assert "threads is 2 there and 1 here" in sweep.refuse("launch", "--skip_confirmation", "--threads", "1")


def test_sweep_may_have_moved(kd_sweep: Sweep, reference: Path) -> None:
    before = read_tree(reference)
    shutil.rmtree(kd_sweep.root / kd_sweep.jobs[-1].folder)
    kd_sweep.launch()
    assert kd_sweep.count() == {"done": 9}
    assert read_tree(reference) == before
    teachers = [job for job in kd_sweep.jobs if job.stage == "erm_teacher"]
    for path in (f"{job.folder}/model.pkl" for job in teachers):
        assert (kd_sweep.root / path).stat().st_mtime_ns == before[reference / path]


@pytest.mark.parametrize(
    ("first", "more", "n_jobs"),
    [
        (["--n_hparams", "1"], ["--n_hparams", "2"], 6),
        (["--n_hparams", "1"], ["--n_hparams_from", "1", "--n_hparams", "2"], 6),
        (["--n_trials", "1"], ["--n_trials", "2"], 6),
        (["--datasets", "Debug28"], ["--datasets", "ColoredDigits"], 6),
        (["--hparams", TINY_TEACHER, "--algorithms", "KD"], ["--algorithms", "KD", "ERM"], 9),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_sweep_grows(sweep: Sweep, finished: dict[str, Path], first: list[str], more: list[str], n_jobs: int) -> None:
    shutil.copytree(finished[first[-1] if first[-1] in finished else "ERM"], sweep.root)
    before = {path: time for path, time in read_tree(sweep.root).items() if path.name != PLAN_FILE}
    sweep.launch(*more)
    assert len(sweep.jobs) == n_jobs
    assert sweep.count() == {"done": n_jobs}
    assert before.items() <= read_tree(sweep.root).items()
    # The folder alone now stands for all of it, whatever the last flags were.
    shutil.rmtree(sweep.root / sweep.jobs[0].folder)
    shutil.rmtree(sweep.root / sweep.jobs[-1].folder)
    sweep.launch()
    assert sweep.count() == {"done": n_jobs}
    # With less it stays as large as it is.
    sweep.launch(*ERM, *SMALL, *first)
    assert len(sweep.jobs) == n_jobs


def test_failure_is_one_line_and_the_rest_is_done(sweep: Sweep) -> None:
    hparams = json.dumps(HPARAMS | TEACHER_HPARAMS | {"teacher_weights": "nowhere.pt"})
    argv = [*KD, *SMALL, "--hparams", hparams, "--command_launcher", "here", "--skip_confirmation"]
    status, _, lines = sweep("launch", *argv)
    assert status == 1
    teacher = sweep.root / sweep.jobs[0].folder
    assert lines[-1].startswith(f"daft-domainbed sweep: 6 of 9 jobs failed, the first in {teacher}: ")
    assert "nowhere.pt" in lines[-1]
    assert sweep.count() == {"done": 3, "failed": 6}
    _, out, _ = sweep("status")
    failures = [line for line in out.splitlines() if line.startswith("failed: ")]
    assert ["nowhere.pt" in line for line in failures] == [True, False]  # what only follows from it comes last
    assert all(" and 2 more: " in line for line in failures)


@pytest.mark.usefixtures("warm_servers")
@pytest.mark.parametrize("launcher", ["local", "dummy"])
def test_launchers_are_chosen_by_name(sweep: Sweep, launcher: str) -> None:
    status, out, lines = sweep("launch", *ERM, *SMALL, "--skip_confirmation", "--command_launcher", launcher)
    assert status == 0, lines
    if launcher == "dummy":
        first, *commands = out.splitlines()
        assert first == "# student: 3"
        assert [shlex.split(line)[:3] for line in commands] == [
            [sys.executable, "-m", "daft_domainbed.launch.work"]
        ] * 3
        assert not sweep.root.exists()
    else:
        assert sweep.count() == {"done": 3}
        assert len([line for line in lines if "/3] ERM student, " in line]) == 3


def test_a_launcher_that_looks_at_nothing_begins_with_what_is_done(
    erm_sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    monkeypatch.setattr(progress.SweepProgress, "__exit__", lambda self, *exc_info: shown.append(self.finished))
    next(erm_sweep.root.glob("*/done")).unlink()
    assert erm_sweep("launch", *ERM, *SMALL, "--skip_confirmation", "--command_launcher", "dummy")[0] == 0
    assert shown == [2]


# --- before it is launched -------------------------------------------------------------------------------------------


def test_yes_launches(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("y\n", "YES\n"):
        shutil.rmtree(sweep.root, ignore_errors=True)
        answer(monkeypatch, text)
        status, out, lines = sweep("launch", *ERM, *SMALL, "--command_launcher", "here")
        assert status == 0
        assert sweep.count() == {"done": 3}
        assert out.splitlines()[0] == f"{sweep.root}: 3 jobs"
        assert "disk: 0 B in use" in out
        assert lines[0].startswith("Launch 3 jobs with here? (y/n) ")


@pytest.mark.parametrize("text", ["n\n", "\n", "yeah\n"])
def test_anything_else_does_not(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    answer(monkeypatch, text)
    status, _, lines = sweep("launch", *ERM, *SMALL)
    assert status == 0
    assert lines[-1].endswith("nothing was done, as you wished")
    assert not sweep.root.exists()


def test_nobody_to_answer(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "")
    assert "nobody is there to answer: add --skip_confirmation" in sweep.refuse("launch", *ERM, *SMALL)
    assert not sweep.root.exists()


def test_nothing_to_launch_is_not_asked_about(erm_sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "")
    status, out, lines = erm_sweep("launch")
    assert status == 0
    assert lines == ["all 3 jobs are done", f"results: daft-domainbed collect_results --input_dir {erm_sweep.root}"]
    assert "3 jobs" in out


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*ERM[2:], *SMALL], "--datasets is needed, as in --datasets EmojiStyles"),
        ([*ERM, *SMALL, "--datasets", "Debug29"], "Did you mean 'Debug28'?"),
        ([*ERM, *SMALL, "--algorithms", "ERM", "DATF"], "Did you mean 'DAFT'?"),
        ([*ERM, *SMALL, "--hparams", '{"kd_weight": 1}'], "'kd_weight'"),
        ([*ERM, *SMALL, "--n_trials_from", "1"], "--n_trials_from 1 leaves none of the trials"),
        ([*ERM, *SMALL, "--n_hparams_from", "1"], "--n_hparams_from 1 leaves none of the draws"),
        ([*ERM, *SMALL, "--command_launcher", "locale"], "no launcher 'locale'. Did you mean 'local'?"),
        ([*ERM, *SMALL, "--slurm", "partition"], "--slurm 'partition': write KEY=VALUE, as in partition=gpu"),
        ([*ERM, *SMALL, "--slurm", "=gpu"], "--slurm '=gpu': write KEY=VALUE"),
        ([*ERM, *SMALL, "--n_jobs", "0"], "--n_jobs: '0' is not a whole number of at least 1"),
        ([*ERM, *SMALL, "--keep", "best"], "--keep: unknown value 'best'"),
        ([*ERM, *SMALL, "--n_job", "2"], "unknown flag '--n_job'. Did you mean '--n_jobs'?"),
        ([*ERM, *SMALL, "--device", "gpu"], "'gpu'"),
    ],
)
def test_what_cannot_be_launched_has_no_folder(sweep: Sweep, argv: list[str], says: str) -> None:
    assert says in sweep.refuse("launch", "--skip_confirmation", *argv)
    assert not sweep.root.exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--steps", "5"], "steps is 4 there and 5 here"),
        (["--seed", "1"], "seed is 0 there and 1 here"),
        (["--holdout_fraction", "0.4"], "holdout_fraction is 0.2 there and 0.4 here"),
        (["--hparams", json.dumps(HPARAMS | {"lr": 0.5})], '"lr": 0.5} here'),
        (["--skip_model_save"], "skip_model_save is False there and True here"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_sweep_does_not_get_the_folder(erm_sweep: Sweep, argv: list[str], says: str) -> None:
    line = erm_sweep.refuse("launch", "--skip_confirmation", *argv)
    assert f"{erm_sweep.root} holds a sweep with other arguments" in line
    assert says in line


def test_another_sweep_does_not_get_the_folder_of_one_that_has_just_begun(sweep: Sweep) -> None:
    sweep("launch", *ERM, *SMALL, "--skip_confirmation", "--command_launcher", "later")
    folder = sweep.root / sweep.jobs[0].folder
    folder.mkdir()
    with claim(folder):
        assert "steps is 4 there and 5 here" in sweep.refuse("launch", "--skip_confirmation", "--steps", "5")
    # Where nothing came of it, it was most likely a mistake.
    sweep.launch("--steps", "5")
    assert sweep.count() == {"done": 3}


@pytest.mark.parametrize("command", ["status", "delete_incomplete"])
@pytest.mark.parametrize("folder", ["is missing", "is empty"])
def test_folder_without_a_sweep(sweep: Sweep, command: str, folder: str) -> None:
    if folder == "is empty":
        sweep.root.mkdir()
    line = sweep.refuse(command)
    assert f"{sweep.root} holds no sweep: it has no plan.json; 'daft-domainbed sweep launch' writes it" in line


@pytest.mark.parametrize("command", ["launch", "status", "delete_incomplete"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is no plan of a sweep"),
        ("[]", "is no plan of a sweep"),
        ('{"args": {}, "jobs": [1]}', "is no plan of a sweep"),
        ('{"args": {"datasets": ["Debug28"]}, "jobs": [{"folder": "x", "args": {}, "sort": 1}]}', "another version"),
    ],
)
def test_plan_that_cannot_be_read(sweep: Sweep, command: str, content: str, says: str) -> None:
    sweep.root.mkdir()
    (sweep.root / PLAN_FILE).write_text(content)
    line = sweep.refuse(command)
    assert says in line
    assert str(sweep.root / PLAN_FILE) in line


def test_folder_is_needed(sweep: Sweep, capfd: Capture) -> None:
    for command in ("launch", "status", "delete_incomplete"):
        assert run_command("sweep", [command]) == 2
        assert "--output_dir is needed: the sweep's folder" in capfd.readouterr().err
    assert run_command("sweep", ["lunch"]) == 2
    assert "unknown value 'lunch'. Did you mean 'launch'?" in capfd.readouterr().err


# --- a file of flags -------------------------------------------------------------------------------------------------

CONFIG = """
datasets: [Debug28]
algorithms: [ERM]
n_trials: 1
n_hparams: 1
single_test_envs: true
skip_model_save: false
steps: 4
checkpoint_freq: 2
device: cpu
hparams:
  batch_size: 8
  backbone: resnet8_w2
  lr: 1e-3
slurm:
  partition: gpu
  time: 1:30:00
  exclusive: true
  requeue: false
command_launcher: here
skip_confirmation: true
"""


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a sweep.yaml."""

    def write(text: str) -> Path:
        (tmp_path / "sweep.yaml").write_text(text)
        return tmp_path / "sweep.yaml"

    return write


def test_config_holds_the_flags(sweep: Sweep, write_config: Callable[[str], Path]) -> None:
    status, _, lines = sweep("launch", "--config", str(write_config(CONFIG)))
    assert status == 0, lines
    assert sweep.count() == {"done": 3}
    args = read_sweep_args(sweep.root)
    assert json.loads(args["hparams"]) == HPARAMS | {"lr": 0.001}
    assert (args["steps"], args["single_test_envs"], args["skip_model_save"]) == (4, True, False)


def test_flags_go_before_the_config(sweep: Sweep, write_config: Callable[[str], Path]) -> None:
    path = write_config(CONFIG + "output_dir: elsewhere\n")
    assert sweep("launch", "--config", str(path), "--steps", "3", "--algorithms", "ERM", "KD")[0] == 0
    assert (read_sweep_args(sweep.root)["steps"], len(sweep.jobs)) == (3, 9)
    assert not Path("elsewhere").exists()


def test_launch_flags_of_a_config_are_text_as_slurm_takes_it(
    sweep: Sweep, write_config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def run(root: Path, jobs: Sequence[Job], options: Any, observer: Any) -> None:
        seen.append(options)

    monkeypatch.setitem(launchers._BUILT_IN, "here", lambda: run)
    text = CONFIG + "n_jobs: 3\nthreads: 2\nmax_array_size: 50\nray_address: 10.0.0.1:6379\n"
    assert sweep("launch", "--config", str(write_config(text)))[0] == 0
    (options,) = seen
    assert options.slurm == {"partition": "gpu", "time": "1:30:00", "exclusive": "True"}
    assert (options.n_jobs, options.threads, options.max_array_size) == (3, 2, 50)
    assert options.ray_address == "10.0.0.1:6379"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dataset: [Debug28]", "unknown flag '--dataset'. Did you mean '--datasets'?"),
        ("datasets: [Debug28]\nsteps: 0", "--steps: '0' is not a whole number of at least 1"),
        ("datasets: [Debug28]\nhparams: {kd_weight: 1}\nalgorithms: [ERM]", "'kd_weight'"),
        ("datasets: [Debug28]\nhparams: [1]", "--hparams '1' is a JSON int, not an object"),
        ("datasets: [Debug28]\nslurm: {partition: }", "--slurm: expected at least one argument"),
        ("datasets: [Debug28", "cannot be read"),
        ("datasets: !!python/object/apply:os.system ['touch hit']", "cannot be read"),
        ("- datasets", "holds no flags: it has to be a mapping"),
        ("", "holds no flags: it has to be a mapping"),
        ("datasets: [Debug28]\n3: 4", "'--3'"),
        ("steps: " + "9" * 5000, "cannot be read"),
        ("[" * 20_000, "cannot be read"),
    ],
)
def test_config_that_cannot_be(sweep: Sweep, write_config: Callable[[str], Path], text: str, says: str) -> None:
    line = sweep.refuse("launch", "--config", str(write_config(text)), "--skip_confirmation")
    assert says in line
    assert not sweep.root.exists()
    assert not Path("hit").exists()


def test_config_that_is_not_there(sweep: Sweep, tmp_path: Path) -> None:
    assert "--config nowhere.yaml cannot be read" in sweep.refuse("launch", "--config", "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "--config binary.yaml cannot be read" in sweep.refuse("launch", "--config", "binary.yaml")


@pytest.mark.parametrize(
    "study", sorted(path.parent.name for path in Path(__file__).parents[2].glob("sweeps/*/sweep.yaml"))
)
def test_studies_of_the_repository_are_read(study: str) -> None:
    from daft_domainbed.launch.sweep import collect_sweep_args
    from daft_domainbed.scripts.sweep import read_config

    args = collect_sweep_args(read_config(Path(__file__).parents[2] / "sweeps" / study / "sweep.yaml", "launch"))
    assert args.datasets and args.algorithms
    assert Path(args.output_dir).parts[:2] == ("runs", study)


# --- status, delete_incomplete ---------------------------------------------------------------------------------------


@pytest.fixture
def motley(sweep: Sweep) -> Iterator[dict[str, str]]:
    """A sweep with a job in every state; folders by state."""
    sweep("launch", *KD, *SMALL, "--skip_confirmation", "--command_launcher", "later")
    jobs = sweep.jobs
    students = [job for job in jobs if job.args.algorithm == "ERM" and job.stage == "student"]

    def stop(step: int, n_steps: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    assert work.do_job(sweep.root, students[0], threads=1).kind == "done"
    for job in students[1:]:
        with pytest.raises(KeyboardInterrupt):
            work.do_job(sweep.root, job, threads=1, on_step=stop)
    write_failure(sweep.root / jobs[0].folder, "no luck")
    folders = {
        "done": students[0].folder,
        "incomplete": students[1].folder,
        "running": students[2].folder,
        "failed": jobs[0].folder,
        "not launched": jobs[1].folder,
        "waiting": jobs[-1].folder,
    }
    with claim(sweep.root / students[2].folder):
        states = read_states(sweep.root, jobs)
        assert {kind: states[folder].kind for kind, folder in folders.items()} == {kind: kind for kind in folders}
        yield folders


def test_status_shows_every_state(sweep: Sweep, motley: dict[str, str]) -> None:
    before = read_tree(sweep.root)
    status, out, lines = sweep("status")
    assert (status, lines) == (0, [])
    assert read_tree(sweep.root) == before
    head, *table = out.splitlines()
    assert head == f"{sweep.root}: 9 jobs"
    assert table[0].split() == ["done", "running", "incomplete", "failed", "waiting", "not", "launched", "all"]
    assert table[1].split()[-7:] == ["0", "0", "0", "1", "0", "2", "3"]
    assert table[2].split()[-7:] == ["1", "1", "1", "0", "0", "0", "3"]
    assert table[3].split()[-7:] == ["0", "0", "0", "0", "3", "0", "3"]
    assert table[4].split() == ["all", "1", "1", "1", "1", "3", "2", "9"]
    assert table[5] == f"failed: {motley['failed']}: no luck"
    assert table[6] == "1 jobs done in the last hour; time left: known once a job of each kind is done"
    assert table[7].startswith("disk: ")
    assert len(table) == 8


def test_incomplete_and_failed_runs_are_deleted_and_no_other(
    sweep: Sweep, motley: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_tree(sweep.root)
    answer(monkeypatch, "y\n")
    status, out, lines = sweep("delete_incomplete")
    assert status == 0
    assert out.splitlines()[0] == f"{sweep.root}: 9 jobs"
    assert lines == ["Delete 2 incomplete runs, with all that they have learnt? (y/n) "]
    assert out.splitlines()[-1] == "deleted 2 incomplete runs"
    gone = {sweep.root / motley[kind] for kind in ("incomplete", "failed")}
    assert read_tree(sweep.root) == {path: time for path, time in before.items() if path.parent not in gone}
    assert not any(folder.exists() for folder in gone)
    assert sweep("delete_incomplete") == (0, "nothing is incomplete\n", [])


@pytest.mark.parametrize(("text", "status"), [("n\n", 0), ("", 2)])
def test_nothing_is_deleted_without_a_yes(
    sweep: Sweep, motley: dict[str, str], monkeypatch: pytest.MonkeyPatch, text: str, status: int
) -> None:
    answer(monkeypatch, text)
    before = read_tree(sweep.root)
    assert sweep("delete_incomplete")[0] == status
    assert read_tree(sweep.root) == before


def test_flags_of_another_launcher_are_refused(sweep: Sweep) -> None:
    assert "the launcher is local: add --command_launcher slurm" in sweep.refuse("launch", *ERM, "--slurm", "time=1")
    assert "add --command_launcher ray" in sweep.refuse("launch", *ERM, "--ray_address", "here:1")


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        ("launch", ["--batch_size", "32"], "--batch_size is for 'sweep adapt', and this is 'sweep launch'"),
        ("evaluate", ["--strong_ood", "noise"], "--strong_ood is for 'sweep adapt'"),
        ("adapt", ["--suite", "quick"], "--suite is for 'sweep evaluate'"),
    ],
)
def test_flags_of_another_question_are_refused(sweep: Sweep, command: str, flags: list[str], says: str) -> None:
    assert says in sweep.refuse(command, *flags)


def test_adaptations_are_asked_of_a_file_and_orders_of_the_command_line(
    erm_sweep: Sweep, write_config: Callable[[str], Path]
) -> None:
    config = ["--config", str(write_config("n_trials: 7\nstrong_ratio: 0.5\nmethods: [source]\n"))]
    flags = ["--n_trials", "2", "--command_launcher", "here", "--skip_confirmation"]
    status, _, lines = erm_sweep("adapt", *config, *flags)
    assert (status, lines[-1].endswith("--adaptation")) == (0, True), lines
    records = [json.loads(path.read_text()) for path in erm_sweep.root.glob("*/adaptation/*-noise-0.5/adaptation.json")]
    assert sorted(record["test_env"] for record in records) == [0, 1, 2]
    assert all([row["n_trials"] for row in record["rows"]] == [2] for record in records)


def test_run_that_is_begun_while_it_is_asked_is_not_deleted(
    sweep: Sweep, motley: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has launched it in another window."""
    folder = sweep.root / motley["incomplete"]

    class Slow(io.StringIO):
        def readline(self, *args: Any) -> str:
            claimed.__enter__()
            return "y\n"

    claimed = claim(folder)
    monkeypatch.setattr(sys, "stdin", Slow())
    status, out, _ = sweep("delete_incomplete")
    assert (status, out.splitlines()[-1]) == (0, "deleted 1 incomplete runs")
    assert (folder / "resume.pt").is_file()
    claimed.__exit__(None, None, None)


def test_store_that_other_sweeps_share_is_left_alone(sweep: Sweep, tmp_path: Path) -> None:
    flags = ["--skip_confirmation", "--command_launcher", "later", "--teachers_dir", str(tmp_path / "store")]
    sweep("launch", *KD, *SMALL, *flags)
    for job in (sweep.jobs[0], sweep.jobs[-1]):
        write_failure(sweep.root / job.folder, "no luck")
    assert sweep.jobs[0].folder.startswith(str(tmp_path / "store"))
    _, out, _ = sweep("delete_incomplete", "--skip_confirmation")
    assert out == "deleted 1 incomplete runs\n"
    assert [path.parent for path in tmp_path.rglob("failed")] == [Path(sweep.jobs[0].folder)]


# --- which weights stay ----------------------------------------------------------------------------------------------


def test_chosen_weights_stay_and_the_tables_with_them(sweep: Sweep, capfd: Capture) -> None:
    flags = [*KD, *SMALL, "--n_hparams", "3"]
    sweep.launch(*flags)
    table = collect(sweep.root, capfd)
    chosen = {
        (table["dataset"], row["algorithm"], cell["env"], number["hparams_seed"])
        for table in json.loads(table)["tables"]
        for row in table["rows"]
        for cell in row["cells"]
        for number in cell["chosen"]
    }
    sweep.launch("--keep", "chosen")
    for job in sweep.jobs:
        has_weights = (sweep.root / job.folder / "model.pkl").is_file()
        args = job.args
        environment = str(args.test_envs[0])
        is_chosen = ("Debug28", args.algorithm, environment, args.hparams_seed) in chosen
        # Every KD student that is chosen needs the one teacher of its domain.
        assert has_weights == (is_chosen or job.stage == "erm_teacher")
    assert sweep.count() == {"done": 21}
    assert 6 <= len(list(sweep.root.glob("*/model.pkl"))) <= 12 < 18
    assert collect(sweep.root, capfd) == table


def test_weights_stay_while_anything_is_missing(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep("launch", *ERM, *SMALL, "--skip_confirmation", "--command_launcher", "later", "--keep", "chosen")
    run_here(sweep.root, sweep.jobs[:2])
    sweep("launch", "--skip_confirmation", "--command_launcher", "later", "--keep", "chosen")
    assert len(list(sweep.root.glob("*/model.pkl"))) == 2


def test_weights_that_are_not_saved(sweep: Sweep) -> None:
    sweep.launch(*KD, *SMALL, "--skip_model_save")
    assert not list(sweep.root.glob("*/*.pkl"))
    assert len(list(sweep.root.glob("teachers/*/model.pkl"))) == 3  # students need them


# --- several at once ------------------------------------------------------------------------------------------------


def test_several_launches_may_write_the_plan(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    jobs = make_plan(sweep)

    def write() -> None:
        for _ in range(5):
            write_plan(sweep, jobs)

    with ThreadPoolExecutor() as pool:
        for written in [pool.submit(write) for _ in range(3)]:
            written.result()
    assert read_jobs(tmp_path) == jobs
    assert [path.name for path in tmp_path.iterdir()] == [PLAN_FILE]


# --- in processes of their own ---------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path, start_script: StartScript) -> Start:
    """Starts the command in a process group of its own, which looks often; its standard error is in a file."""
    numbers = itertools.count()

    def run(root: Path, *argv: str, before: str = "") -> WarmPopen:
        argv = ("launch", "--output_dir", str(root), "--skip_confirmation", *argv)
        code = f"""
import sys
from daft_domainbed.cli import run_command
from daft_domainbed.launch import fork_server, schedule
schedule.SECONDS_BETWEEN_LOOKS = fork_server.SECONDS_BETWEEN_REPORTS = 0.1
{before}
sys.exit(run_command("sweep", {list(argv)!r}))
"""
        with (tmp_path / f"log{next(numbers)}").open("w") as log:
            return start_script(code, stderr=log, start_new_session=True)

    return run


def count_starts(root: Path) -> dict[str, int]:
    """How often each job was begun from its first step."""
    return {path.parent.name: path.read_text().count("Environment:") for path in root.rglob("out.txt")}


def test_two_launches_share_the_work(tmp_path: Path, reference: Path, capfd: Capture, start: Start) -> None:
    root = tmp_path / "sweep"
    teachers = [job.folder for job in read_jobs(reference) if job.stage == "erm_teacher"]
    claims = [claim(root / folder) for folder in teachers]
    for folder, claimed in zip(teachers, claims, strict=True):
        (root / folder).mkdir(parents=True)
        claimed.__enter__()
    try:  # hold them up until both are at work
        launches = [start(root, *KD, *SMALL, "--n_jobs", "1") for _ in range(2)]
        logs = [tmp_path / f"log{i}" for i in range(2)]
        wait_until(
            lambda: all(log.exists() and "/9] " in log.read_text() for log in logs) or any(map(has_ended, launches))
        )
    finally:
        for claimed in claims:
            claimed.__exit__(None, None, None)
    for launch, log in zip(launches, logs, strict=True):
        assert launch.wait(120) == 0, log.read_text()
        # Each says of every job how it ended, whoever did it.
        assert [f"[{i}/9]" in log.read_text() for i in range(1, 10)] == [True] * 9
    assert set(count_starts(root).values()) == {1}
    assert len(count_starts(root)) == 9
    assert collect(root, capfd) == collect(reference, capfd)
    assert not list(root.rglob(".*"))
    assert not list(root.rglob("failed"))


def list_kinds(root: Path) -> list[str]:
    return sorted(state.kind for state in read_states(root, read_jobs(root)).values())


def has_ended(process: WarmPopen) -> bool:
    return process.poll() is not None


def wait_for_held(folder: Path, launcher: WarmPopen, n_jobs: int) -> None:
    """Wait until so many jobs of a launcher wait in the middle of a step, after their first record."""
    wait_until(lambda: len(list(folder.glob("held-*"))) == n_jobs or has_ended(launcher))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for orphans in /proc")
def test_killed_launcher_takes_its_jobs_with_it(tmp_path: Path, start: Start) -> None:
    root = tmp_path / "sweep"
    launcher = start(root, *ERM, *SMALL, "--n_jobs", "2", before=make_hold(tmp_path, "ERM", 2, until="False"))
    wait_for_held(tmp_path, launcher, 2)
    assert len(list_group(launcher.pid)) == 4  # launcher, server, two jobs
    assert list_kinds(root) == ["not launched", "running", "running"]
    launcher.kill()
    wait_until(lambda: not list_group(launcher.pid))
    wait_until(lambda: "running" not in list_kinds(root))  # what is dead holds its lock for a moment
    assert list_kinds(root) == ["incomplete", "incomplete", "not launched"]
    assert not list(root.rglob("failed"))


STOPPED = "daft-domainbed sweep: the jobs that were running have saved where they are; the same command goes on"


def test_stopped_launcher_has_its_jobs_save_and_the_same_command_goes_on(
    tmp_path: Path, finished: dict[str, Path], outcome: Outcome, start: Start
) -> None:
    root, log = tmp_path / "stopped", tmp_path / "log0"
    # The job goes on only once it has heard of it.
    launcher = start(root, *ERM, *SMALL, "--n_jobs", "1", before=make_hold(tmp_path, "ERM", 2))
    wait_for_held(tmp_path, launcher, 1)
    launcher.terminate()
    assert launcher.wait(120) == 143, log.read_text()
    assert log.read_text().splitlines()[-1] == STOPPED
    wait_until(lambda: not list_group(launcher.pid))
    wait_until(lambda: "running" not in list_kinds(root))
    assert list_kinds(root) == ["incomplete", "not launched", "not launched"]
    assert not list(root.rglob(".*"))
    assert start(root).wait(120) == 0
    assert "going on at step" in "".join(path.read_text() for path in root.rglob("err.txt"))
    assert outcome(root) == outcome(finished["ERM"])


def test_launcher_is_interrupted_from_the_keyboard(tmp_path: Path, start: Start) -> None:
    """A terminal sends the signal to all of them at once."""
    root, log = tmp_path / "sweep", tmp_path / "log0"
    launcher = start(root, *ERM, *SMALL, "--n_jobs", "2", before=make_hold(tmp_path, "ERM", 2))
    wait_for_held(tmp_path, launcher, 2)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(120) == 130, log.read_text()
    assert log.read_text().splitlines() == [STOPPED]
    assert list_kinds(root) == ["incomplete", "incomplete", "not launched"]
    assert not list(root.rglob(".*"))


def test_second_signal_does_not_wait(tmp_path: Path, start: Start) -> None:
    """Not even for a job that does not answer: here, one that hangs when it is asked to stop."""
    root, asked = tmp_path / "sweep", tmp_path / "asked"
    until = f"stopping.is_requested() and (Path({str(asked)!r}).touch(), time.sleep(600))"
    launcher = start(root, *ERM, *SMALL, "--n_jobs", "1", before=make_hold(tmp_path, "ERM", 2, until=until))
    wait_for_held(tmp_path, launcher, 1)
    launcher.terminate()
    wait_until(lambda: asked.exists() or has_ended(launcher))
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.wait(0.5)
    launcher.terminate()
    assert launcher.wait(120) == 130
    wait_until(lambda: not list_group(launcher.pid))
    wait_until(lambda: "running" not in list_kinds(root))
    assert list_kinds(root) == ["incomplete", "not launched", "not launched"]
