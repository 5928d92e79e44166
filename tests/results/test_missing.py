"""What is missing: which planned runs are not done, why, and in which order they are told."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from daft_domainbed.results.missing import cut_sweep_path
from daft_domainbed.results.sweeps import read_sweep
from tests.results.conftest import find_job, print_as, read_json

TWO_STEPS = {0: [(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)], 10: [(0.15, 0.25), (0.35, 0.45), (0.55, 0.65)]}
ONE = {10: [(0.5, 0.5)] * 3}


def test_states_of_planned_jobs(sweep):
    done = sweep.run("ERM", [0], TWO_STEPS, "erm_teacher")
    half = sweep.run("AFT", [0], TWO_STEPS, "aft_teacher", [done], is_done=False)
    sweep.run("KD", [0], TWO_STEPS, needs=[done])
    sweep.plan("DAFT", [0], needs=[half])
    sweep.plan("KD", [1], needs=[done])
    failed = sweep.plan("KD", [2])
    (sweep.root / failed).mkdir()
    (sweep.root / failed / "failed").write_text(f"RunError: loss is nan, see {sweep.root}/{failed}/err.txt\nmore\n")
    resumed = sweep.plan("ERM", [0])
    (sweep.root / resumed).mkdir()
    (sweep.root / resumed / "resume.pt").write_bytes(b"")
    empty = sweep.plan("ERM", [1])
    (sweep.root / empty).mkdir()
    lost = sweep.plan("ERM", [2])
    (sweep.root / lost).mkdir()
    (sweep.root / lost / "done").write_text("done")
    sweep.write_plan(algorithms=["ERM", "KD", "DAFT"])
    found = read_sweep(sweep.root)
    assert {missing.planned.folder: missing.reason for missing in found.missing} == {
        half: "incomplete at step 10 of 11",
        resumed: "incomplete, before its first record",
        empty: "not launched",
        lost: "done, but its results.jsonl cannot be used",
        sweep.jobs[4]["folder"]: "not launched",
        failed: f"failed: RunError: loss is nan, see {failed}/err.txt",
        sweep.jobs[3]["folder"]: f"waiting for teacher {Path(half).name}",
    }
    algorithms = [missing.planned.key.algorithm for missing in found.missing]
    assert algorithms == ["AFT", "ERM", "ERM", "ERM", "KD", "KD", "DAFT"]
    assert [run.key.algorithm for run in found.runs] == ["KD"]


def test_teachers_in_a_store_outside_the_sweep(sweep, tmp_path):
    """Their folders are absolute in the plan: they count as done or not, and never get into the sweep's own store."""
    store = tmp_path / "store"
    for name, is_done in (("a", True), ("b", False)):
        folder = str(store / name)
        job = {"stage": "erm_teacher", "folder": folder, "needs": [], "args": sweep.make_args("ERM", [0], folder)}
        sweep.jobs.append(job)
        sweep.write_run(folder, job["args"], TWO_STEPS, is_done)
    sweep.run("KD", [0], TWO_STEPS, needs=[str(store / "a")])
    sweep.plan("KD", [1], needs=[str(store / "b")])
    (store / "b" / "failed").write_text(f"no space left for {store}/b/model.pkl")
    sweep.write_plan()
    found = read_sweep(sweep.root)
    assert [missing.reason for missing in found.missing] == [
        "failed: no space left for b/model.pkl",
        "waiting for teacher b",
    ]
    assert (found.teachers, found.notes) == ({}, [])


def test_teachers_removed_after_use_are_not_missing(sweep):
    erm = sweep.run("ERM", [0], TWO_STEPS, "erm_teacher")
    aft = sweep.run("AFT", [0], TWO_STEPS, "aft_teacher", [erm])
    daft = sweep.run("DAFT", [0], TWO_STEPS, needs=[aft])
    sweep.write_plan()
    shutil.rmtree(sweep.root / "teachers")
    assert read_sweep(sweep.root).missing == []
    (sweep.root / daft / "done").unlink()
    assert [missing.planned.folder for missing in read_sweep(sweep.root).missing] == [erm, aft, daft]


def test_path_of_a_sweep_is_cut_where_it_is_a_path_and_nowhere_else(full_sweep, monkeypatch):
    monkeypatch.chdir(full_sweep.root.parent)
    (job,) = [job for job in read_sweep(full_sweep.root).plan.runs.values() if job.folder.startswith("teachers")][:1]
    job = replace(job, args=job.args | {"output_dir": f"a/{job.folder}"})  # a sweep that was made as `a`
    assert cut_sweep_path("auto: a pretrained one in a/teachers/x", full_sweep.root, job) == (
        "auto: a pretrained one in teachers/x"
    )
    root = str(full_sweep.root)
    assert cut_sweep_path(f"{root}: {root}/teachers, {root}2/x", full_sweep.root, job) == f".: teachers, {root}2/x"


def test_missing_jobs(full_sweep):
    root = full_sweep.root
    (root / find_job(full_sweep, "AFT", 2, 1, "aft_teacher")["folder"] / "done").unlink()
    shutil.rmtree(root / find_job(full_sweep, "DAFT", 2, 1)["folder"])
    failed = root / find_job(full_sweep, "KD", 0, 0)["folder"]
    (failed / "done").unlink()
    (failed / "failed").write_text(f"disk full at {root.resolve()}/teachers/x\n")
    teacher = Path(find_job(full_sweep, "AFT", 2, 1, "aft_teacher")["folder"]).name
    keys = ("dataset", "algorithm", "test_envs", "trial_seed", "hparams_seed", "reason")
    assert read_json(root)["missing"] == [
        dict(zip(keys, values, strict=True))
        for values in (
            ("Toy", "AFT", [2], 1, 0, f"teacher {teacher}: incomplete at step 10 of 11"),
            ("Toy", "KD", [0], 0, 0, "failed: disk full at teachers/x"),
            ("Toy", "DAFT", [2], 1, 0, f"waiting for teacher {teacher}"),
        )
    ]
    text = print_as("text", root)
    assert "KD on red (n = 1): failed: disk full at teachers/x (trial 0, hparams_seed 0)." in text
    assert f"DAFT on blue (n = 1): waiting for teacher {teacher} (trial 1, hparams_seed 0)." in text
    assert "Not done, so counted nowhere: 3 of 30 planned jobs." in text


def test_teachers_of_any_kind_come_in_the_order_in_which_they_are_made(sweep):
    """Stages are told apart by what they need, not by their names."""
    clean = sweep.plan("ERM", [0], "erm_teacher")
    robust = sweep.plan("AT", [0], "at_teacher")
    tuned = sweep.plan("Tuned", [0], "tuned_teacher", [robust])
    last = sweep.plan("Last", [0], "last_teacher", [clean, tuned])
    early = sweep.plan("A", [0], needs=[last])
    sweep.write_plan(algorithms=["Last", "A", "Tuned", "ERM"])
    order = [missing.planned.folder for missing in read_sweep(sweep.root).missing]
    assert order == [clean, robust, tuned, last, early]


def test_teachers_behind_one_another_are_not_missing_once_their_students_are_done(sweep):
    folders = [sweep.plan("ERM", [0], "a_teacher")]
    for stage in ("c_teacher", "b_teacher"):
        folders.append(sweep.plan("AFT", [0], stage, folders[-1:]))
    sweep.run("DAFT", [0], TWO_STEPS, needs=folders[-1:])
    sweep.write_plan()
    assert read_sweep(sweep.root).missing == []
