"""Lineages: the teachers behind a student, as its record or the plan tells."""

from __future__ import annotations

import json

import pytest

from daft_domainbed.results.lineage import trace_teachers
from daft_domainbed.results.sweeps import read_sweep
from tests.results.conftest import find_row, read_json

ONE = {10: [(0.5, 0.5)] * 3}


def test_teachers_that_no_record_describes_are_found_by_the_plan(full_sweep):
    """DomainBed's own loop writes records without our extra keys."""
    expected = read_json(full_sweep.root)
    for path in full_sweep.root.glob("**/results.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [json.dumps({key: record[key] for key in record if key != "teacher"}) + "\n" for record in records]
        path.write_text("".join(lines))
    assert read_json(full_sweep.root) == expected
    run = next(run for run in read_sweep(full_sweep.root).runs if run.key.algorithm == "DAFT")
    assert [teacher.algorithm for teacher in trace_teachers(read_sweep(full_sweep.root), run)] == ["AFT", "ERM"]


def test_a_teacher_that_names_itself_does_not_hang(sweep):
    block = {"algorithm": "ERM", "path": "../teachers/loop"}
    folder = sweep.run("ERM", [0], ONE, "erm_teacher", first={"teacher": block})
    (sweep.root / folder).rename(sweep.root / "teachers" / "loop")
    sweep.run("KD", [0], ONE, first={"teacher": block})
    assert find_row(read_json(sweep.root), "oracle", "ERM", "teacher")["cells"][0]["mean"] == pytest.approx(50)


def test_teachers_nested_without_end_and_impossible_accuracies(sweep):
    block: dict = {"algorithm": "ERM", "accuracies": {"env0_in_acc": 0.6}}
    for _ in range(200):
        block = {"algorithm": "AFT", "accuracies": {"env0_in_acc": 87.5}, "teacher": block}
    sweep.run("DAFT", [0], ONE, first={"teacher": block})
    found = read_sweep(sweep.root)
    assert 0 < len(trace_teachers(found, found.runs[0])) < 200
    assert find_row(read_json(sweep.root), "oracle", "AFT", "teacher")["cells"][0]["mean"] is None


def describe(algorithm: str, percent: float, **below: object) -> dict:
    """Return what a student records about a teacher."""
    accuracies = {"env0_in_acc": percent / 100}
    return {"algorithm": algorithm, "path": f"../teachers/{algorithm}{percent}", "accuracies": accuracies, **below}


def trace(sweep) -> list[tuple[str, str, int]]:
    found = read_sweep(sweep.root)
    return [(t.algorithm, t.slot, t.generation) for t in trace_teachers(found, found.runs[0])]


def test_a_method_may_have_several_teachers_and_these_theirs(sweep):
    robust = describe("AT", 50, teachers={"start": describe("Big", 81)})
    teachers = {"clean_teacher": describe("AFT", 70, teacher=describe("ERM", 80)), "robust_teacher": robust}
    sweep.run("BMTARD", [0], ONE, first={"teachers": teachers})
    assert trace(sweep) == [
        ("AFT", "clean_teacher", 1),
        ("AT", "robust_teacher", 1),
        ("ERM", "teacher", 2),
        ("Big", "start", 2),
    ]
    data = read_json(sweep.root)
    for algorithm, percent in (("ERM", 80), ("AFT", 70), ("AT", 50), ("Big", 81)):
        assert find_row(data, "oracle", algorithm, "teacher")["cells"][0]["mean"] == pytest.approx(percent)


def test_the_slot_called_teacher_is_one_of_several(sweep):
    first = {"teacher": describe("ERM", 80), "teachers": {"second": describe("AT", 50), "none": {}, "no": 3}}
    sweep.run("Two", [0], ONE, first=first)
    assert trace(sweep) == [("ERM", "teacher", 1), ("AT", "second", 1)]


def test_several_teachers_that_no_record_describes(sweep):
    needs = [sweep.run(name, [0], ONE, f"{name.lower()}_teacher") for name in ("ERM", "AT")]
    sweep.run("BMTARD", [0], ONE, needs=needs)
    sweep.write_plan()
    assert trace(sweep) == [("ERM", "teacher", 1), ("AT", "teacher", 1)]


def test_of_several_students_the_nearest_one_shows_its_teacher(sweep):
    """Whatever the methods are called, and in whatever order the sweep was asked for them."""
    sweep.run("Far", [0], ONE, first={"teacher": describe("Mid", 70, teacher=describe("AT", 40))})
    sweep.run("Near", [0], ONE, first={"teachers": {"robust_teacher": describe("AT", 60)}})
    for order in (["Far", "Near"], ["Near", "Far"]):
        sweep.write_plan(algorithms=order)
        assert find_row(read_json(sweep.root), "oracle", "AT", "teacher")["cells"][0]["mean"] == pytest.approx(60)


def test_a_student_that_starts_from_its_teacher_comes_last(sweep):
    sweep.run("AFT", [0], ONE, first={"teacher": describe("ERM", 50)})
    assert find_row(read_json(sweep.root), "oracle", "ERM", "teacher")["cells"][0]["mean"] == pytest.approx(50)
    sweep.run("DAFT", [0], ONE, first={"teacher": describe("AFT", 70, teacher=describe("ERM", 60))})
    assert find_row(read_json(sweep.root), "oracle", "ERM", "teacher")["cells"][0]["mean"] == pytest.approx(60)
