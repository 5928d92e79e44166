"""From a search to further trials of what it chose: the right draw, given to the right jobs, planned once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed import plugin
from daft_domainbed.arguments import SweepArgs
from daft_domainbed.cli import run_command
from daft_domainbed.errors import UsageError
from daft_domainbed.host import contract
from daft_domainbed.hparams import parse_json
from daft_domainbed.launch import launchers
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.plan_file import read_jobs, read_sweep_args, write_plan
from daft_domainbed.launch.rerun import choose_settings, plan_rerun
from daft_domainbed.training.prepare import prepare
from tests.launch.conftest import make_sweep

ENVS = 3


@pytest.fixture(autouse=True)
def clean_host() -> Iterator[None]:
    yield
    plugin.unregister(contract.find_host())


def pretend(root: Path, jobs: list[Job], validation: dict[tuple[str, int, int, int], float]) -> None:
    """Write records of students as if they had been trained; by (algorithm, domain, trial, draw), else 0.5."""
    for job in jobs:
        if job.stage != "student":
            continue
        args, (env,) = job.args, job.args.test_envs
        value = validation.get((args.algorithm, env, args.trial_seed, args.hparams_seed), 0.5)
        record: dict[str, Any] = {"step": 0, "args": vars(args), "hparams": prepare(args).hparams}
        for other in range(ENVS):
            record |= {f"env{other}_in_acc": 0.5, f"env{other}_out_acc": 0.0 if other == env else value}
        folder = root / job.folder
        folder.mkdir(parents=True)
        (folder / "results.jsonl").write_text(json.dumps(record) + "\n")
        (folder / "done").write_text("done")


@pytest.fixture
def search(tmp_path: Path) -> tuple[SweepArgs, list[Job]]:
    sweep = make_sweep(tmp_path / "search", "ERM", "DAFT", n_trials=2, n_hparams=3)
    jobs = make_plan(sweep)
    write_plan(sweep, jobs)
    return sweep, jobs


def find_student(jobs: list[Job], algorithm: str, env: int, trial: int, draw: int = 0) -> Job:
    (job,) = (
        job
        for job in jobs
        if job.stage == "student"
        and (job.args.algorithm, job.args.test_envs, job.args.trial_seed, job.args.hparams_seed)
        == (algorithm, [env], trial, draw)
    )
    return job


def test_the_best_draw_on_average_is_chosen_for_all_domains(search: tuple[SweepArgs, list[Job]]) -> None:
    sweep, jobs = search
    # Draw 2 of trial 1 is best on two domains and on average; draw 1 of trial 0 is best on the first domain alone.
    better = {("ERM", 0, 0, 1): 0.9, ("ERM", 0, 1, 2): 0.6, ("ERM", 1, 1, 2): 0.8, ("ERM", 2, 1, 2): 0.8}
    # The defaults win one trial, and lose on average over trials.
    better |= {("DAFT", env, 0, 0): 0.8 for env in range(ENVS)} | {("DAFT", env, 1, 0): 0.3 for env in range(ENVS)}
    better |= {("DAFT", env, 0, 1): 0.6 for env in range(ENVS)}
    pretend(Path(sweep.output_dir), jobs, better)
    erm, daft = choose_settings(sweep, "per-algorithm")
    assert (erm.trial_seed, erm.hparams_seed, erm.test_env) == (1, 2, None)
    assert erm.validation == pytest.approx((0.6 + 0.8 + 0.8) / 3)
    assert (daft.trial_seed, daft.hparams_seed) == (0, 1)
    by_env = [setting for setting in choose_settings(sweep, "per-environment") if setting.algorithm == "ERM"]
    assert [(s.test_env, s.trial_seed, s.hparams_seed) for s in by_env] == [(0, 0, 1), (1, 1, 2), (2, 1, 2)]


def test_defaults_are_one_draw_of_all_trials(search: tuple[SweepArgs, list[Job]]) -> None:
    sweep, jobs = search
    pretend(Path(sweep.output_dir), jobs, {("ERM", env, trial, 0): 0.7 for env in range(ENVS) for trial in (0, 1)})
    (erm,) = choose_settings(replace(sweep, algorithms=["ERM"]), "per-algorithm")
    assert (erm.trial_seed, erm.hparams_seed, erm.hparams) == (None, 0, {})
    assert erm.describe() == "ERM on Debug28: the defaults (validation 70.0)"


def test_drawn_values_reach_student_and_aft_teacher_as_in_the_search(
    search: tuple[SweepArgs, list[Job]], tmp_path: Path
) -> None:
    """The rerun of the search's own trial trains the same models: hyperparameters of every stage are the search's."""
    sweep, jobs = search
    pretend(Path(sweep.output_dir), jobs, {("DAFT", env, 1, 2): 0.9 for env in range(ENVS)})
    again, settings = plan_rerun(sweep, 3, "per-algorithm", str(tmp_path / "new"))
    assert (again.n_trials_from, again.n_trials) == (2, 5)
    assert [s.hparams_seed for s in settings if s.algorithm == "DAFT"] == [2]
    assert again.chosen and again.chosen["from"] == "../search" and again.chosen["choose"] == "per-algorithm"
    same_trial = make_plan(replace(again, n_trials_from=1, n_trials=2))
    for env in range(ENVS):
        before, now = find_student(jobs, "DAFT", env, 1, 2), find_student(same_trial, "DAFT", env, 1)
        assert prepare(now.args).hparams == prepare(before.args).hparams
        assert now.needs == before.needs  # the name of a teacher is a hash of all that it is made of
    new = make_plan(again)
    erm_teachers = {job.args.hparams for job in [*jobs, *new] if job.stage == "erm_teacher"}
    assert len(erm_teachers) == 1  # no draw reaches them
    assert {job.args.trial_seed for job in new} == {2, 3, 4} and {job.args.hparams_seed for job in new} == {0}


def test_plan_is_found_again_and_says_where_it_comes_from(
    search: tuple[SweepArgs, list[Job]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(launchers._BUILT_IN, "nobody", lambda: lambda *args: {})  # plans, and trains nothing
    sweep, jobs = search
    pretend(Path(sweep.output_dir), jobs, {("ERM", env, 0, 1): 0.9 for env in range(ENVS)})
    flags = [
        "--from",
        sweep.output_dir,
        "--output_dir",
        str(tmp_path / "new"),
        "--n_trials",
        "2",
    ]
    flags += ["--command_launcher", "nobody", "--skip_confirmation"]
    assert run_command("sweep", ["rerun", *flags]) == 0
    printed = capsys.readouterr().err
    assert "ERM on Debug28: draw 1 of trial 0 (validation 90.0)" in printed and "jobs are not done" in printed
    stored = read_sweep_args(tmp_path / "new")
    setting = stored["chosen"]["settings"][0]
    assert (setting["trial_seed"], setting["hparams_seed"]) == (0, 1) and "lr" in setting["hparams"]
    first = [job.folder for job in read_jobs(tmp_path / "new")]
    assert len(first) == ENVS * 2 * 4
    erm = find_student(read_jobs(tmp_path / "new"), "ERM", 0, 2)
    assert parse_json(erm.args.hparams)["ERM"] == setting["hparams"]
    assert run_command("sweep", ["rerun", *flags]) == 0
    assert [job.folder for job in read_jobs(tmp_path / "new")] == first
    launch = ["launch", "--output_dir", str(tmp_path / "new"), "--command_launcher", "nobody", "--skip_confirmation"]
    assert run_command("sweep", launch) == 0
    assert [job.folder for job in read_jobs(tmp_path / "new")] == first


def test_fewer_algorithms_leave_behind_what_they_do_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launchers._BUILT_IN, "nobody", lambda: lambda *args: {})
    user = {"kd_weight": 0.5, "batch_size": 8, "KD": {"lr": 0.1}, "ERM": {"lr": 0.2}}
    sweep = make_sweep(tmp_path / "search", "ERM", "KD", user=user)
    write_plan(sweep, make_plan(sweep))
    pretend(tmp_path / "search", make_plan(sweep), {})
    new = tmp_path / "new"
    flags = ["--from", sweep.output_dir, "--output_dir", str(new), "--n_trials", "1", "--algorithms", "ERM"]
    flags += ["--command_launcher", "nobody", "--skip_confirmation"]
    assert run_command("sweep", ["rerun", *flags]) == 0
    stored = parse_json(read_sweep_args(new)["hparams"]).keys()
    assert stored >= {"batch_size", "ERM"} and not stored & {"kd_weight", "KD"}
    student = find_student(read_jobs(new), "ERM", 0, 1)
    assert prepare(student.args).hparams["lr"] == 0.2 and prepare(student.args).hparams["batch_size"] == 8
    asked = ["--hparams", json.dumps(user), "--output_dir", str(tmp_path / "other")]
    assert run_command("sweep", ["rerun", *flags, *asked]) == 2  # what is asked for now has to be known


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--from is needed"),
        (["--from", "{search}", "--n_hparams", "2"], "--n_hparams has no place here"),
        (["--from", "{search}"], "has no finished run of ERM on Debug28"),
        (["--from", "{search}", "--output_dir", "{search}"], "is the search itself"),
        (["--from", "nowhere"], "nowhere holds no sweep"),
    ],
)
def test_what_cannot_be_rerun_is_refused(
    search: tuple[SweepArgs, list[Job]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    root = search[0].output_dir
    argv = ["rerun", "--output_dir", str(tmp_path / "new"), *(flag.format(search=root) for flag in flags)]
    assert run_command("sweep", argv) == 2
    assert message in capsys.readouterr().err


def test_a_draw_of_another_version_is_refused(search: tuple[SweepArgs, list[Job]], tmp_path: Path) -> None:
    sweep, jobs = search
    pretend(Path(sweep.output_dir), jobs, {("ERM", env, 0, 1): 0.9 for env in range(ENVS)})
    path = Path(sweep.output_dir) / find_student(jobs, "ERM", 0, 0, 1).folder / "results.jsonl"
    record = json.loads(path.read_text())
    record["hparams"]["lr"] *= 2
    path.write_text(json.dumps(record))
    with pytest.raises(UsageError, match="was trained with lr .*, and its draw is"):
        choose_settings(sweep, "per-algorithm")


def test_values_for_one_algorithm_alone(tmp_path: Path) -> None:
    own = {"lr": 0.5, "ERM": {"lr": 0.25}, "DAFT": {"weight_decay": 0.125, "aft_weight": 0.75}}
    jobs = make_plan(make_sweep(tmp_path, "ERM", "KD", "DAFT", user=own))
    by_stage = {(job.stage, job.args.algorithm): prepare(job.args).hparams for job in jobs}
    assert by_stage["student", "ERM"]["lr"] == 0.25
    for key, hparams in by_stage.items():
        if key != ("student", "ERM"):
            assert hparams["lr"] == 0.5  # teachers of the algorithm ERM, too
        assert hparams["weight_decay"] == (0.125 if key == ("student", "DAFT") else 0)
    assert by_stage["aft_teacher", "AFT"]["aft_weight"] == 0.75  # handed on, as a drawn one is
    plain = make_plan(make_sweep(tmp_path, "ERM", "KD", "DAFT", user={"lr": 0.5}))
    folders = [{job.folder for job in plan if job.args.algorithm == "KD"} for plan in (jobs, plain)]
    assert folders[0] == folders[1]  # what is for others changes nothing


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"CORAL": {"lr": 1.0}}, "--hparams has values for 'CORAL', and there is no such algorithm in the sweep"),
        ({"ERM": {"kd_weight": 0.5}}, "no hyperparameter 'kd_weight' of ERM. It belongs to"),
        ({"ERM": {"lr": -1}}, "hyperparameter lr is -1"),
        ({"ERM": {"input_size": 32}}, "input_size is the data set's: give it beside 'ERM'"),
    ],
)
def test_values_that_an_algorithm_cannot_have_are_refused(tmp_path: Path, own: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(make_sweep(tmp_path, "ERM", "KD", user=own))
