"""Costs: training times by hand, each teacher once."""

from __future__ import annotations

from daft_domainbed.results.costs import add_up_costs
from daft_domainbed.results.sweeps import read_sweep

ONE = {10: [(0.5, 0.5)] * 3}


def test_stages_add_up(full_sweep):
    # 6 teachers of 20 s each, 6 students of 10 s of each algorithm: 420 s in all.
    costs = {cost.stage: cost[1:] for cost in add_up_costs(read_sweep(full_sweep.root))}
    assert list(costs) == ["ERM teacher", "AFT teacher", "ERM student", "KD student", "DAFT student"]
    assert costs["AFT teacher"] == (6, 20.0, 120.0, 100 * 120 / 420)
    assert costs["DAFT student"] == (6, 10.0, 60.0, 100 * 60 / 420)


def test_a_teacher_outside_the_sweep_counts_once_as_its_students_recorded_it(sweep):
    block = {"algorithm": "AT", "path": "/store/AT-1", "seconds": 30.0}
    for env in range(2):
        sweep.run("KD", [env], ONE, first={"teachers": {"robust_teacher": block}}, last={"seconds": 10.0})
    teacher, student = add_up_costs(read_sweep(sweep.root))
    assert teacher == ("AT teacher", 1, 30.0, 30.0, 60.0)
    assert student == ("KD student", 2, 10.0, 20.0, 40.0)


def test_what_was_not_recorded_is_not_known(sweep):
    path = sweep.root / sweep.run("ERM", [0], ONE) / "results.jsonl"
    path.write_text(path.read_text().replace('"step_time": 0.5', '"step_time": null'))
    assert add_up_costs(read_sweep(sweep.root)) == [("ERM student", 1, None, None, 0.0)]
