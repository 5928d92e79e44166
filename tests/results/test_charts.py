"""Drawings: what is drawn where, and how much of it."""

from __future__ import annotations

import re

import numpy as np

from daft_domainbed.results.cells import Table
from daft_domainbed.results.charts import MOST_POINTS, draw_curves, draw_teachers_and_students
from daft_domainbed.results.sweeps import Sweep, read_sweep
from daft_domainbed.results.tables import build_results

ONE = {10: [(0.5, 0.5)] * 3}


def build_first_table(sweep) -> tuple[Table, Sweep]:
    found = read_sweep(sweep.root)
    return build_results(found).tables[0], found


def test_long_curves_are_thinned_out_and_keep_the_chosen_checkpoint(sweep):
    rise = np.linspace(0.1, 0.6, 2000)
    accs = {10 * i: [(value, value)] * 3 for i, value in enumerate(rise)}
    accs[7770] = [(0.9, 0.9)] * 3
    sweep.run("ERM", [0], accs)
    table, _ = build_first_table(sweep)
    drawn = "".join(drawing for chart in draw_curves(table) for _, drawing in chart["panels"])
    points = [path.count(" ") for path in re.findall(r'class="line c0" d="(M[^"]+)"', drawn)]
    assert max(points) == MOST_POINTS + 1
    assert "90.0 at the chosen step 7770" in drawn
    assert len(drawn) < 20_000


def test_a_point_stands_where_its_step_and_accuracy_put_it(sweep):
    # Steps 0 to 20 span x 30 to 292, the range 40 to 60 percent y 138 down to 8.
    sweep.run("ERM", [0], {0: [(0.4, 0.0)] * 3, 10: [(0.6, 0.0)] * 3, 20: [(0.5, 0.0)] * 3})
    table, _ = build_first_table(sweep)
    ((name, drawing), *_) = draw_curves(table)[0]["panels"]
    assert name == table.environments[0]
    assert 'class="line c0" d="M30.0 138.0L161.0 8.0L292.0 73.0"' in drawing


def test_trials_are_thin_and_their_mean_is_thick(sweep):
    for trial in range(7):
        sweep.run("ERM", [0], ONE, trial_seed=trial)
    table, _ = build_first_table(sweep)
    ((_, drawing), *_) = draw_curves(table)[0]["panels"]
    assert (drawing.count('class="trial c0"'), drawing.count('class="line c0"')) == (5, 1)


def test_a_student_stands_beside_each_of_its_teachers(sweep):
    below = {"algorithm": "Big", "accuracies": {"env0_in_acc": 0.9}}
    teachers = {
        "clean_teacher": {"algorithm": "ERM", "accuracies": {"env0_in_acc": 0.7}, "teacher": below},
        "robust_teacher": {"algorithm": "AT", "accuracies": {"env0_in_acc": 0.4}},
    }
    for trial in range(2):
        sweep.run("BMTARD", [0], ONE, first={"teachers": teachers}, trial_seed=trial)
    table, found = build_first_table(sweep)
    drawing = draw_teachers_and_students(table, found)
    told = re.findall(r"<title>([^<]*)</title>", drawing)[1:]
    assert told == [
        "clean_teacher of BMTARD on env0: 70.0",
        "robust_teacher of BMTARD on env0: 40.0",
        "BMTARD on env0: 50.0",
    ]
    assert drawing.count('class="teacher c0"') == drawing.count('class="span c0"') == 2


def test_nothing_is_drawn_without_teachers(sweep):
    sweep.run("ERM", [0], ONE)
    assert draw_teachers_and_students(*build_first_table(sweep)) == ""
