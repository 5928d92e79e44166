"""Records: what a run's file may hold, what is left out of it, and how that is noted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.results.records import Note
from daft_domainbed.results.sweeps import read_sweep

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
        ({"args": {"dataset": ""}}, "args without dataset"),
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


def test_a_change_of_the_environment_count_within_a_run_is_left_out(sweep):
    folder = sweep.run("ERM", [0], {0: TWO_STEPS[0], 10: [*TWO_STEPS[10], (0.5, 0.5)], 20: TWO_STEPS[0][:2]})
    found = read_sweep(sweep.root)
    assert found.runs[0].steps.tolist() == [0]
    assert found.notes[0] == Note(
        f"{folder}/results.jsonl:2 (and 1 more lines)",
        "another number of environments than the first line; left out",
    )


def test_what_records_of_domainbeds_own_loop_cannot_hold_lies_beside_them(sweep):
    path = sweep.root / sweep.run("BMTARD", [0], TWO_STEPS)
    teachers = {"clean_teacher": {"algorithm": "ERM"}, "robust_teacher": {"algorithm": "AT"}}
    beside = {"environments": ["r", "g", "b"], "teachers": teachers, "seed": 7}
    (path / "provenance.json").write_text(json.dumps(beside))
    found = read_sweep(sweep.root)
    assert (found.runs[0].teachers, found.environments) == (teachers, {"Toy": ["r", "g", "b"]})
    assert "seed" not in found.runs[0].first
    (path / "provenance.json").write_text("{")
    assert read_sweep(sweep.root).runs[0].teachers == {}


def test_odd_names_are_spelt_out(sweep):
    """Line breaks, escape sequences, and bytes of file names that are no text."""
    folder = sweep.run("ERM", [1], TWO_STEPS, first={"environments": ["a\nb", "caf\udce9", "ö"]})
    edit_lines(
        sweep.root / folder,
        args=json.loads((sweep.root / folder / "results.jsonl").read_text().splitlines()[0])["args"]
        | {"dataset": "folder:\x1b[2J"},
    )
    found = read_sweep(sweep.root)
    assert found.environments == {r"folder:\x1b[2J": [r"a\nb", r"caf\xe9", "ö"]}
    assert found.runs[0].key.dataset == r"folder:\x1b[2J"
