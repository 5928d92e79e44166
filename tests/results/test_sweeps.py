"""Sweeps: what counts, what is left out, and that nothing is a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daft_domainbed.errors import UsageError
from daft_domainbed.results.records import Note
from daft_domainbed.results.sweeps import read_sweep

TWO_STEPS = {0: [(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)], 10: [(0.15, 0.25), (0.35, 0.45), (0.55, 0.65)]}


def test_another_environment_count_is_left_out(sweep):
    sweep.run("ERM", [0], TWO_STEPS)
    sweep.run("KD", [0], TWO_STEPS)
    folder = sweep.run("DAFT", [0], {0: TWO_STEPS[0][:2]})
    found = read_sweep(sweep.root)
    assert [run.key.algorithm for run in found.runs] == ["ERM", "KD"]
    assert found.notes == [Note(folder, "2 environments, but Toy has 3 in this sweep; left out")]


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
    second = sweep.run("ERM", [0], TWO_STEPS)
    third = sweep.run("ERM", [0], {0: TWO_STEPS[0]})
    found = read_sweep(sweep.root)
    assert [run.folder for run in found.runs] == [second]
    copy, other = sorted(found.notes[:2])
    assert (copy.path, other.path) == (first, third)
    assert copy.why.startswith(f"a copy of {second} (ERM on Toy, test_envs [0], trial_seed 0")
    assert other.why.startswith(f"another run of the job of {second} (ERM on Toy, test_envs [0], trial_seed 0")


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


def test_with_a_plan_only_jobs_that_are_done_count(sweep):
    sweep.run("ERM", [0], TWO_STEPS)
    sweep.run("KD", [0], TWO_STEPS, is_done=False)
    stranger = sweep.run("IRM", [0], TWO_STEPS)
    sweep.jobs.pop()
    begun = sweep.run("IRM", [1], TWO_STEPS, is_done=False)
    sweep.jobs.pop()
    swapped = sweep.plan("DAFT", [0])
    sweep.write_run(swapped, sweep.make_args("DAFT", [1], swapped), TWO_STEPS)
    sweep.write_plan()
    found = read_sweep(sweep.root)
    assert [run.key.algorithm for run in found.runs] == ["ERM", "IRM"]
    assert [note.path for note in found.notes] == [swapped, stranger, begun]
    assert "holds DAFT on Toy, test_envs [1]" in found.notes[0].why
    assert "plan.json has DAFT on Toy, test_envs [0]" in found.notes[0].why
    assert [note.why for note in found.notes[1:]] == [
        "not in plan.json; counted, as where folders were merged", "not in plan.json; not done; left out",
    ]  # fmt: skip


def test_a_store_of_another_name_inside_the_sweep(sweep):
    folder = sweep.run("ERM", [0], TWO_STEPS, "erm_teacher")
    (sweep.root / "teachers").rename(sweep.root / "store")
    sweep.jobs[0]["folder"] = folder.replace("teachers", "store")
    sweep.write_plan()
    found = read_sweep(sweep.root)
    assert (list(found.teachers), found.missing, found.notes) == ([Path(folder).name], [], [])


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
