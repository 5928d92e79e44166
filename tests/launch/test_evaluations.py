from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.suites import SUITES
from daft_domainbed.launch.evaluations import plan_adaptations, plan_evaluations, read_evaluations, write_evaluations
from daft_domainbed.launch.job import EvaluationJob, name_job
from daft_domainbed.launch.plan_file import read_jobs
from daft_domainbed.launch.sweep import show_status
from daft_domainbed.launch.work import _find_job, do_job
from daft_domainbed.results.adaptation import FORMATS as ADAPTATION_FORMATS
from daft_domainbed.results.adaptation import build_adaptations
from daft_domainbed.results.formats import FORMATS
from daft_domainbed.results.robustness import build_robustness
from daft_domainbed.results.sweeps import read_sweep
from daft_domainbed.results.tables import build_results
from tests.launch.conftest import plan, run_here

ASKED = {"suite": "quick", "n_examples": 2, "norm": ["linf"], "device": "cpu"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of KD over three domains, done, and then evaluated."""
    folder = tmp_path_factory.mktemp("sweep")
    assert run_here(folder, plan(folder, "KD")) == {}
    return folder


@pytest.fixture(autouse=True)
def small_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "quick", replace(SUITES["quick"], pgd_steps=2, restarts=1))
    monkeypatch.setattr("daft_domainbed.evaluation.suites._GRIDS", {"linf": [0, 1]})
    monkeypatch.setattr("daft_domainbed.evaluation.tasks.CURVE_STEPS", 2)


def test_chosen_students_and_their_teachers_are_planned(root: Path) -> None:
    jobs = plan_evaluations(root, ASKED)
    assert [name_job(job) for job in jobs] == ["KD evaluation"] * 3 + ["ERM evaluation"] * 3
    for job in jobs:
        assert (root / job.checkpoint).is_file()
        assert job.folder == f"{Path(job.checkpoint).parent}/evaluation"
        assert job.asked == ASKED


def test_they_know_what_their_runs_were_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {run.folder: replace(run, imports=["mine.py"], cwd="/there") for run in read_jobs(root)}
    monkeypatch.setattr("daft_domainbed.launch.evaluations.read_jobs", lambda _: list(runs.values()))
    for job in [*plan_evaluations(root, ASKED), *plan_adaptations(root, {})]:
        run = runs[str(Path(job.checkpoint).parent)]
        assert (job.args, job.imports, job.cwd) == (run.args, ["mine.py"], "/there")


def test_a_job_is_an_evaluation_of_its_own_and_the_table_shows_it(root: Path) -> None:
    before = show_results(root)
    jobs = plan_evaluations(root, ASKED)
    write_evaluations(root, jobs)
    assert read_evaluations(root) == jobs
    assert _find_job(root, jobs[0].folder) == jobs[0]
    steps: list[Any] = []
    for job in jobs:
        assert do_job(root, job, threads=1, on_step=lambda *at: steps.append(at)).kind == "done"
        assert (root / job.folder / "done").is_file()
    assert steps[-1][0] == steps[-1][1] > 1
    assert do_job(root, jobs[0], threads=1, on_step=steps.clear).kind == "done"  # nothing was asked again
    assert steps
    tables, notes = build_robustness(read_sweep(root))
    assert [(row.algorithm, row.role) for row in tables[0].rows] == [("KD", "student"), ("ERM", "teacher")]
    assert all(len(row.values["clean held-out"].numbers) == 1 for row in tables[0].rows)
    assert notes == []
    # The sweep itself is what it was.
    assert not read_sweep(root).notes
    assert show_results(root) == before
    with pytest.raises(UsageError, match="n_examples 2, not 3"):
        write_evaluations(root, plan_evaluations(root, ASKED | {"n_examples": 3}))


def show_results(root: Path) -> dict[str, str]:
    """The tables that have nothing to do with evaluations, in every format."""
    results = build_results(read_sweep(root))
    return {name: show(results) for name, show in FORMATS.items()}


def test_adaptations_are_jobs_too_and_their_table_shows_them(root: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(root, tmp_path / "sweep")
    before = show_results(moved)
    asked = {"methods": ["source", "test"], "batch_size": 16, "n_trials": 2, "device": "cpu"}
    jobs = plan_adaptations(moved, asked)
    assert [name_job(job) for job in jobs] == ["KD adaptation"] * 3 + ["ERM adaptation"] * 3
    assert [job.asked["test_env"] for job in jobs] == [0, 1, 2] * 2
    evaluations = plan_evaluations(moved, ASKED)
    for group in (evaluations, jobs):
        write_evaluations(moved, group)
    assert read_evaluations(moved) == [*evaluations, *jobs]
    for job in jobs:
        assert do_job(moved, job, threads=1).kind == "done"
        assert (moved / job.folder / "done").is_file()
    (table,), notes = build_adaptations(read_sweep(moved))
    assert notes == []
    assert table.stream == ("Debug28", "noise", 1.0, 16)
    assert [(row.algorithm, row.role, row.method) for row in table.rows] == [
        *(("KD", "student", method) for method in asked["methods"]),
        *(("ERM", "teacher", method) for method in asked["methods"]),
    ]
    numbers = [json.loads((moved / job.folder / "adaptation.json").read_text())["rows"][0]["acc_s"] for job in jobs[:3]]
    assert list(table.rows[0].values["acc_s"].numbers) == [pytest.approx(sum(numbers) / 3)]
    for name, show in ADAPTATION_FORMATS.items():
        assert "noise" in show([table]), name
    content = json.loads(ADAPTATION_FORMATS["json"]([table]))
    assert (content["schema"], content["adaptation"][0]["rows"][0]["values"]["acc_s"]["n"]) == (1, 1)
    assert show_results(moved) == before
    with pytest.raises(UsageError, match="batch_size 16, not 8"):
        write_evaluations(moved, plan_adaptations(moved, asked | {"batch_size": 8}))


def test_a_plan_that_holds_evaluations_plans_no_runs_by_them(root: Path, tmp_path: Path) -> None:
    plan = json.loads((root / "plan.json").read_text())
    plan["jobs"] += [asdict(job) for job in plan_evaluations(root, ASKED)]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    found = read_sweep(tmp_path)
    assert found.plan is not None
    assert len(found.plan.runs) == len(found.missing) == len(plan["jobs"]) / 2


def test_status_counts_evaluations(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = plan_evaluations(root, ASKED)
    moved = shutil.copytree(root, tmp_path / "sweep")
    for job in jobs:
        shutil.rmtree(moved / job.folder, ignore_errors=True)
    write_evaluations(moved, jobs)
    (moved / jobs[0].folder).mkdir()
    (moved / jobs[0].folder / "journal.jsonl").touch()
    show_status(moved)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": 12 jobs")
    (line,) = (line for line in lines if line.startswith("KD evaluation, Debug28"))
    assert line.split()[-4:] == ["0", "1", "2", "3"]  # done, incomplete, not launched


def test_what_went_wrong_is_left_in_the_folder(root: Path, tmp_path: Path) -> None:
    (job, *_) = plan_evaluations(root, ASKED)
    lost = replace(job, folder="lost/evaluation", checkpoint="lost/model.pkl")
    outcome = do_job(tmp_path, lost, threads=1)
    assert outcome.kind == "failed"
    assert "lost/model.pkl" in outcome.reason
    assert "lost/model.pkl" in (tmp_path / "lost/evaluation/failed").read_text()


def test_nothing_chosen_and_weights_that_are_gone(tmp_path: Path, root: Path) -> None:
    plan(tmp_path)
    with pytest.raises(UsageError, match="launch the sweep first"):
        plan_evaluations(tmp_path, ASKED)
    job = plan_evaluations(root, ASKED)[0]
    path = root / job.checkpoint
    aside = path.rename(path.with_suffix(".aside"))
    try:
        with pytest.raises(UsageError, match="is gone"):
            plan_evaluations(root, ASKED)
    finally:
        aside.rename(path)


def test_a_damaged_list_is_refused(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) == []
    for text in ("nonsense", "[]", json.dumps({"jobs": [{"folder": 1}]})):
        (tmp_path / "evaluations.json").write_text(text)
        with pytest.raises(UsageError, match="delete it"):
            read_evaluations(tmp_path)


def test_an_evaluation_is_no_other_job(root: Path) -> None:
    job = plan_evaluations(root, ASKED)[0]
    assert isinstance(job, EvaluationJob)
    assert job.needs == []
