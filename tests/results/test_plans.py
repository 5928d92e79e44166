"""Plans: a broken one is noted, and stages and algorithms have an order."""

from __future__ import annotations

import pytest

from daft_domainbed.results.plans import read_plan
from daft_domainbed.results.sweeps import read_sweep
from tests.results.conftest import read_json

TWO_STEPS = {0: [(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)], 10: [(0.15, 0.25), (0.35, 0.45), (0.55, 0.65)]}
ONE = {10: [(0.5, 0.5)] * 3}


@pytest.mark.parametrize("text", ["", "[]", '{"jobs": 3}', '{"jobs": [{}]}', '{"jobs": [{"stage": "x", "folder": 1}]}'])
def test_a_broken_plan_is_noted_and_the_folder_read_without(sweep, text):
    sweep.run("ERM", [0], TWO_STEPS)
    (sweep.root / "plan.json").write_text(text)
    found = read_sweep(sweep.root)
    assert (found.plan, len(found.runs)) == (None, 1)
    assert found.notes[0].path == "plan.json"


def test_rows_are_in_the_order_asked_for_else_in_the_tables(sweep):
    for algorithm in ("Mixup", "DAFT", "IRM", "KD", "ERM"):
        sweep.run(algorithm, [0], ONE)
    rows = read_json(sweep.root)["tables"][0]["rows"]
    assert [row["algorithm"] for row in rows] == ["ERM", "KD", "DAFT", "IRM", "Mixup"]
    sweep.write_plan(algorithms=["KD", "IRM", "ERM"])
    rows = read_json(sweep.root)["tables"][0]["rows"]
    assert [row["algorithm"] for row in rows] == ["KD", "IRM", "ERM", "DAFT", "Mixup"]


def test_depth_is_the_longest_chain_of_teachers(sweep):
    clean = sweep.plan("ERM", [0], "erm_teacher")
    tuned = sweep.plan("AFT", [0], "aft_teacher", [clean])
    both = sweep.plan("BMTARD", [0], needs=[clean, tuned])
    alone = sweep.plan("KD", [0], needs=["teachers/elsewhere"])
    plan = read_plan(sweep.write_plan(), [])
    assert plan.measure_depths() == {clean: 0, tuned: 1, both: 2, alone: 0}


def test_teachers_that_need_each_other_have_some_depth(sweep):
    for this, other in (("a", "b"), ("b", "a")):
        sweep.jobs.append(
            {"stage": "x_teacher", "folder": this, "needs": [other], "args": sweep.make_args("ERM", [0], this)}
        )
    assert read_plan(sweep.write_plan(), []).measure_depths().keys() == {"a", "b"}
    assert len(read_sweep(sweep.root).missing) == 2
