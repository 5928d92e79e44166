"""Reading: what counts, what is left out, and that nothing is a traceback."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daft_domainbed.errors import UsageError
from daft_domainbed.results.records import Note, cut_sweep_path, read_sweep

TWO_STEPS = {0: [(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)], 10: [(0.15, 0.25), (0.35, 0.45), (0.55, 0.65)]}


def append(path: Path, text: str | bytes) -> None:
    with (path / "results.jsonl").open("ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def edit_lines(path: Path, **changes: Any) -> None:
    """Change keys of every record of a run; a key set to `...` goes."""
    lines = [json.loads(line) | changes for line in (path / "results.jsonl").read_text().splitlines()]
    kept = ({key: value for key, value in line.items() if value is not ...} for line in lines)
    (path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def test_a_run_is_read_as_it_was_written(sweep):
    folder = sweep.run("ERM", [1], TWO_STEPS, hparams={"lr": 0.01}, last={"seconds": 12.5})
    (run,) = read_sweep(sweep.root).runs
    assert (run.folder, run.key) == (folder, ("Toy", "ERM", (1,), 0, 0))
    assert run.steps.tolist() == [0, 10]
    assert run.accs.tolist() == [[list(pair) for pair in TWO_STEPS[step]] for step in (0, 10)]
    assert (run.first["hparams"], run.is_done, run.seconds, run.n_envs) == ({"lr": 0.01}, True, 12.5, 3)


def test_seconds_are_step_times_by_steps_where_not_recorded(sweep):
    sweep.run("ERM", [1], TWO_STEPS)  # 0.5 s a step: step 0, then ten more
    (run,) = read_sweep(sweep.root).runs
    assert run.seconds == 11 * 0.5


@pytest.mark.parametrize("end", [b'{"step": 20, "env0_in', b"\x00\x00\x00", b'{"step": 20}'[:-1]])
def test_a_truncated_last_line_is_no_error(sweep, end):
    path = sweep.root / sweep.run("ERM", [0], TWO_STEPS)
    append(path, end)
    found = read_sweep(sweep.root)
    assert found.runs[0].steps.tolist() == [0, 10]
    assert found.notes == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"step": 20, "env0', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"7", "not a JSON object"),
        (b"{}", "no step"),
        (b'{"step": true}', "no step"),
        (b'{"step": 20, "args": []}', "args without dataset"),
    ],
)
def test_a_broken_line_is_left_out_and_named(sweep, line, why):
    folder = sweep.run("ERM", [0], TWO_STEPS)
    append(sweep.root / folder, line + b"\n")
    found = read_sweep(sweep.root)
    assert found.runs[0].steps.tolist() == [0, 10]
    assert found.notes == [Note(f"{folder}/results.jsonl:3", f"{why}; left out")]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"env1_in_acc": "0.5"}, "an accuracy that is not a fraction"),
        ({"env1_in_acc": 87.5}, "an accuracy that is not a fraction"),
        ({"env1_in_acc": math.nan}, "an accuracy that is not a fraction"),
        ({"env1_in_acc": None}, "an accuracy that is not a fraction"),
        ({"env1_in_acc": 10**400}, "an accuracy that is not a fraction"),
        ({"env1_in_acc": ..., "env0_in_acc": ...}, "test_envs [2], but accuracies of 0 environments"),
        ({"env2_in_acc": ...}, "test_envs [2], but accuracies of 2 environments"),
        ({"step": 1.5}, "no step"),
        ({"args": None}, "args without dataset"),
        ({"args": {"dataset": "a\x1b[2Jb"}}, "args without dataset"),
    ],
)
def test_records_that_make_no_sense_are_left_out_with_one_note(sweep, changes, why):
    sweep.run("KD", [2], TWO_STEPS)
    folder = sweep.run("ERM", [2], TWO_STEPS)
    edit_lines(sweep.root / folder, **changes)
    found = read_sweep(sweep.root)
    assert [run.key.algorithm for run in found.runs] == ["KD"]
    assert found.notes == [Note(f"{folder}/results.jsonl:1 (and 1 more lines)", f"{why}; left out")]


def test_a_loss_of_nan_does_no_harm(sweep):
    edit_lines(sweep.root / sweep.run("ERM", [0], TWO_STEPS), loss=math.nan, step_time=math.nan)
    found = read_sweep(sweep.root)
    assert found.runs[0].steps.tolist() == [0, 10]
    assert (found.runs[0].seconds, found.notes) == (None, [])


def test_of_two_records_of_one_step_the_last_counts(sweep):
    path = sweep.root / sweep.run("ERM", [0], TWO_STEPS)
    again = json.loads((path / "results.jsonl").read_text().splitlines()[0]) | {"env0_in_acc": 0.9}
    append(path, json.dumps(again) + "\n")
    (run,) = read_sweep(sweep.root).runs
    assert run.steps.tolist() == [0, 10]
    assert run.accs[0, 0, 0] == 0.9
    assert run.first["env0_in_acc"] == 0.9


def test_a_record_of_another_run_in_the_same_file_is_left_out(sweep):
    folder = sweep.run("ERM", [0], TWO_STEPS)
    other = sweep.make_args("ERM", [1], folder)
    line = json.loads((sweep.root / folder / "results.jsonl").read_text().splitlines()[0])
    append(sweep.root / folder, json.dumps(line | {"args": other, "step": 20}) + "\n")
    found = read_sweep(sweep.root)
    assert found.runs[0].steps.tolist() == [0, 10]
    assert found.notes[0].why == "a record of another run; left out"


def test_another_environment_count_is_left_out(sweep):
    sweep.run("ERM", [0], TWO_STEPS)
    sweep.run("KD", [0], TWO_STEPS)
    folder = sweep.run("DAFT", [0], {0: TWO_STEPS[0][:2]})
    found = read_sweep(sweep.root)
    assert [run.key.algorithm for run in found.runs] == ["ERM", "KD"]
    assert found.notes == [Note(folder, "2 environments, but Toy has 3 in this sweep; left out")]


def test_a_change_of_the_environment_count_within_a_run_is_left_out(sweep):
    folder = sweep.run("ERM", [0], {0: TWO_STEPS[0], 10: [*TWO_STEPS[10], (0.5, 0.5)], 20: TWO_STEPS[0][:2]})
    found = read_sweep(sweep.root)
    assert found.runs[0].steps.tolist() == [0]
    assert found.notes[0] == Note(
        f"{folder}/results.jsonl:2 (and 1 more lines)",
        "another number of environments than the first line; left out",
    )


def test_foreign_folders_and_files(sweep):
    sweep.run("ERM", [0], TWO_STEPS)
    (sweep.root / "plots").mkdir()
    (sweep.root / ".cache").mkdir()
    (sweep.root / "odd" / "results.jsonl").mkdir(parents=True)
    (sweep.root / "notes.txt").write_text("hello")
    found = read_sweep(sweep.root)
    assert len(found.runs) == 1
    assert [note.path for note in found.notes] == ["odd", "plots"]
    assert found.notes[1].why == "not a run: no results.jsonl; left out"


def test_without_a_plan_what_is_not_done_counts_and_is_noted(sweep):
    first = sweep.run("ERM", [0], TWO_STEPS, is_done=False)
    sweep.run("KD", [0], TWO_STEPS, is_done=False)
    found = read_sweep(sweep.root)
    assert len(found.runs) == 2
    assert found.missing == []
    assert found.notes == [Note(f"{first} (and 1 more)", "not done; without a plan.json it counts as far as it got")]


def test_two_runs_of_one_job_never_merge(sweep):
    first = sweep.run("ERM", [0], TWO_STEPS, is_done=False)
    second = sweep.run("ERM", [0], TWO_STEPS, hparams={"backbone": "other"})
    found = read_sweep(sweep.root)
    assert [run.folder for run in found.runs] == [second]
    assert found.notes[0].path == first
    assert found.notes[0].why.startswith(f"the same job as {second} (ERM on Toy, test_envs [0], trial_seed 0")


def test_a_single_run_is_a_sweep_of_one(sweep):
    teacher = sweep.run("ERM", [0], TWO_STEPS, "erm_teacher")
    folder = sweep.run("KD", [0], TWO_STEPS)
    found = read_sweep(sweep.root / folder)
    assert [(run.folder, run.key.algorithm) for run in found.runs] == [(".", "KD")]
    assert list(found.teachers) == [Path(teacher).name]


def test_what_is_no_sweep_is_bad_usage(tmp_path, sweep):
    with pytest.raises(UsageError, match="is not a folder"):
        read_sweep(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a folder"):
        read_sweep(tmp_path / "file")
    with pytest.raises(UsageError, match="holds no run that can be read"):
        read_sweep(sweep.root)
    (sweep.root / "a").mkdir()
    (sweep.root / "a" / "results.jsonl").write_text("nonsense\n")
    with pytest.raises(UsageError, match="can be read; a/results.jsonl:1: not JSON"):
        read_sweep(sweep.root)


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
    assert {missing.job.folder: missing.reason for missing in found.missing} == {
        half: "incomplete at step 10 of 11",
        resumed: "incomplete, before its first record",
        empty: "not launched",
        lost: "done, but its results.jsonl cannot be used",
        sweep.jobs[4]["folder"]: "not launched",
        failed: f"failed: RunError: loss is nan, see {failed}/err.txt",
        sweep.jobs[3]["folder"]: f"waiting for teacher {Path(half).name}",
    }
    assert [missing.job.key.algorithm for missing in found.missing] == ["AFT", "ERM", "ERM", "ERM", "KD", "KD", "DAFT"]
    assert [run.key.algorithm for run in found.runs] == ["KD"]


def test_with_a_plan_only_planned_jobs_that_are_done_count(sweep):
    sweep.run("ERM", [0], TWO_STEPS)
    sweep.run("KD", [0], TWO_STEPS, is_done=False)
    stranger = sweep.run("IRM", [0], TWO_STEPS)
    sweep.jobs.pop()
    swapped = sweep.plan("DAFT", [0])
    sweep.write_run(swapped, sweep.make_args("DAFT", [1], swapped), TWO_STEPS)
    sweep.write_plan()
    found = read_sweep(sweep.root)
    assert [run.key.algorithm for run in found.runs] == ["ERM"]
    assert [note.path for note in found.notes] == [stranger, swapped]
    assert "holds DAFT on Toy, test_envs [1]" in found.notes[1].why
    assert "plan.json has DAFT on Toy, test_envs [0]" in found.notes[1].why


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
    assert [missing.job.folder for missing in read_sweep(sweep.root).missing] == [erm, aft, daft]


def test_a_store_of_another_name_inside_the_sweep(sweep):
    folder = sweep.run("ERM", [0], TWO_STEPS, "erm_teacher")
    (sweep.root / "teachers").rename(sweep.root / "store")
    sweep.jobs[0]["folder"] = folder.replace("teachers", "store")
    sweep.write_plan()
    found = read_sweep(sweep.root)
    assert (list(found.teachers), found.missing, found.notes) == ([Path(folder).name], [], [])


@pytest.mark.parametrize("text", ["", "[]", '{"jobs": 3}', '{"jobs": [{}]}', '{"jobs": [{"stage": "x", "folder": 1}]}'])
def test_a_broken_plan_is_noted_and_the_folder_read_without(sweep, text):
    sweep.run("ERM", [0], TWO_STEPS)
    (sweep.root / "plan.json").write_text(text)
    found = read_sweep(sweep.root)
    assert (found.plan, len(found.runs)) == (None, 1)
    assert found.notes[0].path == "plan.json"


def test_names_of_environments(sweep, make_sweep, tmp_path):
    sweep.run("ERM", [0], TWO_STEPS)
    assert read_sweep(sweep.root).environments == {"Toy": ["env0", "env1", "env2"]}
    sweep.run("KD", [0], TWO_STEPS, first={"environments": ["r", "g", "b"]})
    assert read_sweep(sweep.root).environments == {"Toy": ["r", "g", "b"]}
    sweep.write_plan()
    assert read_sweep(sweep.root).environments == {"Toy": ["red", "green", "blue"]}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_make_a_traceback(sweep, data):
    """Results and plan with some bytes changed, dropped or put in: read, or refused as bad usage."""
    sweep.jobs.clear()
    folder = sweep.run("ERM", [0], TWO_STEPS, first={"environments": ["r", "g", "b"], "teacher": {"path": "x"}})
    sweep.write_plan()
    for path in (sweep.root / folder / "results.jsonl", sweep.root / "plan.json"):
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 4))):
            at = data.draw(st.integers(0, len(content)))
            content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        path.write_bytes(content)
    try:
        found = read_sweep(sweep.root)
    except UsageError:
        return
    for run in found.runs:
        assert np.isfinite(run.accs).all()


def test_results_never_import_torch():
    code = "import sys, daft_domainbed.results.report as r; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_path_of_a_sweep_is_cut_where_it_is_a_path_and_nowhere_else(full_sweep, monkeypatch):
    monkeypatch.chdir(full_sweep.root.parent)
    (job,) = [job for job in read_sweep(full_sweep.root).plan.jobs.values() if job.folder.startswith("teachers")][:1]
    job = replace(job, args=job.args | {"output_dir": f"a/{job.folder}"})  # a sweep that was made as `a`
    assert cut_sweep_path("auto: a pretrained one in a/teachers/x", full_sweep.root, job) == (
        "auto: a pretrained one in teachers/x"
    )
    root = str(full_sweep.root)
    assert cut_sweep_path(f"{root}: {root}/teachers, {root}2/x", full_sweep.root, job) == f".: teachers, {root}2/x"
