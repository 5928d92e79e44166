"""Which weights of a finished sweep stay, and that nobody's numbers depend on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from daft_domainbed.host import contract
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.retention import remove_weights
from daft_domainbed.launch.states import is_done, read_states
from daft_domainbed.runtime.locks import claim
from tests.launch.conftest import plan, run_here

Outcome = Callable[[Path], dict[str, str]]
ALGORITHMS = ("ERM", "KD", "DAFT")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of ERM, KD and DAFT; not to be written to."""
    root = tmp_path_factory.mktemp("finished")
    assert run_here(root, plan(root, *ALGORITHMS)) == {}
    return root


@pytest.fixture(scope="module")
def grown(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a second draw of hyperparameters, of which nothing was ever removed."""
    root = tmp_path_factory.mktemp("grown")
    shutil.copytree(finished, root, dirs_exist_ok=True)
    assert run_here(root, plan(root, *ALGORITHMS, n_hparams=2)) == {}
    return root


@pytest.fixture
def jobs(finished: Path, tmp_path: Path) -> list[Job]:
    """A finished sweep in the folder `sweep`."""
    shutil.copytree(finished, tmp_path / "sweep")
    return plan(tmp_path / "sweep", *ALGORITHMS)


def list_kept(root: Path, jobs: list[Job]) -> set[str]:
    """Return the folders that still have weights; they have all that they had, or none."""
    for job in jobs:
        assert len(list((root / job.folder).glob("model*.pkl"))) in (0, 2)
    return {job.folder for job in jobs if (root / job.folder / "model.pkl").is_file()}


def get(jobs: list[Job], name: str, test_env: int = 0) -> Job:
    """Return the job of an algorithm, or of a stage, with a domain held out."""
    names = {job.folder: job.args.algorithm if job.stage == "student" else job.stage for job in jobs}
    (job,) = [job for job in jobs if names[job.folder] == name and job.args.test_envs == [test_env]]
    return job


def test_chosen_students_and_the_teachers_behind_them_stay(tmp_path: Path, jobs: list[Job], outcome: Outcome) -> None:
    root = tmp_path / "sweep"
    before = outcome(root)
    size = sum(path.stat().st_size for path in root.rglob("*.pkl"))
    daft, erm = get(jobs, "DAFT", 1), get(jobs, "ERM", 2)
    freed = remove_weights(root, jobs, [daft.folder, erm.folder])
    kept = {daft.folder, get(jobs, "aft_teacher", 1).folder, get(jobs, "erm_teacher", 1).folder, erm.folder}
    assert list_kept(root, jobs) == kept
    assert freed == size - sum(path.stat().st_size for path in root.rglob("*.pkl")) > 0
    # Nothing but weights is gone.
    after = outcome(root)
    assert after.items() <= before.items()
    assert all(name.endswith(".pkl") for name in before.keys() - after.keys())
    assert all(state.kind == "done" for state in read_states(root, jobs).values())
    assert remove_weights(root, jobs, [daft.folder, erm.folder]) == 0


def test_weights_of_single_checkpoints_go_too(tmp_path: Path, jobs: list[Job]) -> None:
    folder = tmp_path / "sweep" / get(jobs, "ERM").folder
    (folder / "model_step2.pkl").write_bytes(bytes(10))
    (folder / "resume.pt").write_bytes(bytes(10))
    remove_weights(tmp_path / "sweep", jobs, [])
    assert not list(folder.glob("*.pkl"))
    assert (folder / "resume.pt").is_file()


def test_teachers_that_unfinished_jobs_wait_for_stay(tmp_path: Path, jobs: list[Job]) -> None:
    root = tmp_path / "sweep"
    daft = get(jobs, "DAFT")
    (root / daft.folder / "done").unlink()
    remove_weights(root, jobs, [])
    assert list_kept(root, jobs) == {daft.folder, get(jobs, "aft_teacher").folder, get(jobs, "erm_teacher").folder}


def test_folders_at_work_are_left_alone(tmp_path: Path, jobs: list[Job]) -> None:
    root = tmp_path / "sweep"
    erm = get(jobs, "ERM")
    with claim(root / erm.folder):
        remove_weights(root, jobs, [])
        assert list_kept(root, jobs) == {erm.folder}


def test_store_that_other_sweeps_share_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    jobs = plan(root, "KD", teachers_dir=str(tmp_path / "store"))
    assert run_here(root, jobs) == {}
    remove_weights(root, jobs, [])
    assert list_kept(root, jobs) == {job.folder for job in jobs if job.stage == "erm_teacher"}
    assert len(list((tmp_path / "store").glob("*/model.pkl"))) == 3


@pytest.mark.parametrize("order", [1, -1], ids=["teachers first", "students first"])
def test_grown_sweep_has_the_numbers_of_one_that_was_never_pruned(
    tmp_path: Path, jobs: list[Job], grown: Path, outcome: Outcome, order: int
) -> None:
    root = tmp_path / "sweep"
    remove_weights(root, jobs, [get(jobs, "ERM").folder])
    assert list_kept(root, jobs) == {get(jobs, "ERM").folder}
    new = plan(root, *ALGORITHMS, n_hparams=2)
    assert len(new) > len(jobs)
    assert run_here(root, new[::order]) == {}
    assert all(is_done(root / job.folder) for job in new)
    ours, theirs = outcome(root), outcome(grown)
    gone = {f"{job.folder}/{name}" for job in jobs for name in ("model.pkl", "model_best.pkl")} - ours.keys()
    assert gone
    assert ours == {name: content for name, content in theirs.items() if name not in gone}
    # What the new students needed is back.
    assert list_kept(root, jobs) >= {get(jobs, "erm_teacher", env).folder for env in range(3)}
    assert not list(root.rglob(".*"))


def test_stopped_while_a_removed_teacher_is_trained_again(
    tmp_path: Path, jobs: list[Job], grown: Path, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "sweep"
    remove_weights(root, jobs, [])
    kd = get(plan(root, "KD", n_hparams_from=1, n_hparams=2), "KD")
    original, left = contract.find_host().algorithms.ERM.update, 2

    def update(self: object, *args: object) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(contract.find_host().algorithms.ERM, "update", update)
        run_here(root, [kd])
    assert read_states(root, jobs)[get(jobs, "erm_teacher").folder].kind == "incomplete"
    assert run_here(root, [kd]) == {}
    for folder in (kd.folder, *kd.needs):
        assert outcome(root / folder) == outcome(grown / folder)
