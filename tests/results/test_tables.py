"""Tables: numbers by hand, teachers' rows, and what a cell lacks."""

from __future__ import annotations

import shutil

import pytest

from tests.results.conftest import find_row, print_as, read_json

ONE = {10: [(0.5, 0.5)] * 3}


def test_schema_and_numbers(full_sweep):
    data = read_json(full_sweep.root)
    assert list(data) == ["schema", "tables", "missing"]
    assert (data["schema"], data["missing"]) == (1, [])
    selections = ["training-domain", "leave-one-domain-out", "oracle"]
    assert [(table["dataset"], table["selection"]) for table in data["tables"]] == [
        ("Toy", name) for name in selections
    ]
    table = data["tables"][0]
    assert list(table) == ["dataset", "selection", "environments", "kind", "held_out", "rows"]
    assert table["environments"] == ["red", "green", "blue"]
    assert [(row["algorithm"], row["role"]) for row in table["rows"]] == [
        ("ERM", "student"),
        ("KD", "student"),
        ("DAFT", "student"),
        ("ERM", "teacher"),
        ("AFT", "teacher"),
    ]
    daft = table["rows"][2]
    assert list(daft) == ["algorithm", "role", "cells", "average", "average_stderr"]
    cell = daft["cells"][1]  # 60 + 5 + 1 + trial
    assert cell["env"] == "green"
    assert cell["mean"] == pytest.approx(66.5)
    assert cell["stderr"] == pytest.approx(0.5)  # deviation 1/sqrt(2), over sqrt(2)
    assert cell["n"] == 2
    hparams = {"kd_weight": 0.7, "lr": 0.001}
    assert cell["chosen"] == [
        {"trial_seed": trial, "hparams_seed": 0, "step": 10, "hparams": hparams} for trial in (0, 1)
    ]
    assert daft["average"] == pytest.approx((65.5 + 66.5 + 67.5) / 3)


def test_a_selection_never_asked_for_has_empty_cells_and_no_missing_jobs(full_sweep):
    data = read_json(full_sweep.root)
    row = find_row(data, "leave-one-domain-out", "DAFT")
    assert row["cells"][0] == {"env": "red", "mean": None, "stderr": None, "n": 0, "chosen": []}
    assert (row["average"], data["missing"]) == (None, [])
    text = print_as("text", full_sweep.root)
    assert "leave-one-domain-out cross-validation needs runs with every pair of domains held out" in text


def test_teachers_rows_are_the_teachers_behind_the_chosen_students(full_sweep):
    data = read_json(full_sweep.root)
    erm = find_row(data, "training-domain", "ERM", "teacher")
    aft = find_row(data, "training-domain", "AFT", "teacher")
    assert [cell["mean"] for cell in erm["cells"]] == pytest.approx([70, 71, 72])
    assert [cell["mean"] for cell in aft["cells"]] == pytest.approx([75, 76, 77])
    assert aft["cells"][0]["chosen"][0] == {
        "trial_seed": 0,
        "hparams_seed": 0,
        "step": 10,
        "hparams": {"aft_eps": 0.01},
    }


def test_the_aft_teacher_follows_the_chosen_daft_student(sweep):
    """Two draws, two AFT teachers: each selection shows the teacher of the student that it chose."""
    for seed, (validation, test_out, teacher) in enumerate([(0.9, 0.1, 0.71), (0.2, 0.8, 0.72)]):
        accs = {10: [(0.5, test_out), (0.5, validation), (0.5, validation)]}
        block = {"algorithm": "AFT", "path": f"../teachers/t{seed}", "steps": 5, "accuracies": {"env0_in_acc": teacher}}
        sweep.run("DAFT", [0], accs, hparams_seed=seed, first={"teacher": block})
    data = read_json(sweep.root)
    by_validation = find_row(data, "training-domain", "AFT", "teacher")["cells"][0]
    by_oracle = find_row(data, "oracle", "AFT", "teacher")["cells"][0]
    assert (by_validation["mean"], by_oracle["mean"]) == (pytest.approx(71), pytest.approx(72))
    # its folder is not in this sweep, so its hyperparameters are not known
    assert by_oracle["chosen"] == [{"trial_seed": 0, "hparams_seed": 1, "step": 4, "hparams": None}]


def test_the_erm_teacher_is_kds_else_that_of_dafts_aft_teacher(sweep):
    def block(algorithm, percent, **below):
        path = f"../teachers/{algorithm}{percent}"
        return {"algorithm": algorithm, "path": path, "accuracies": {"env0_in_acc": percent / 100}, **below}

    daft = {"teacher": block("AFT", 80, teacher=block("ERM", 60))}
    sweep.run("DAFT", [0], ONE, first=daft)
    assert find_row(read_json(sweep.root), "oracle", "ERM", "teacher")["cells"][0]["mean"] == pytest.approx(60)
    sweep.run("KD", [0], ONE, first={"teacher": block("ERM", 65)})
    assert find_row(read_json(sweep.root), "oracle", "ERM", "teacher")["cells"][0]["mean"] == pytest.approx(65)
    assert find_row(read_json(sweep.root), "oracle", "AFT", "teacher")["cells"][0]["mean"] == pytest.approx(80)


def test_leave_one_domain_out_with_pairs(sweep):
    for env in range(3):
        sweep.run("ERM", [env], {10: [(0.1 * (env + 1), 0.5)] * 3})
    for pair in ([0, 1], [0, 2], [1, 2]):
        sweep.run("ERM", pair, ONE)
    sweep.write_plan()
    row = find_row(read_json(sweep.root), "leave-one-domain-out", "ERM")
    assert [cell["mean"] for cell in row["cells"]] == pytest.approx([10, 20, 30])
    shutil.rmtree(sweep.root / sweep.jobs[4]["folder"])  # the pair {0, 2}
    data = read_json(sweep.root)
    row = find_row(data, "leave-one-domain-out", "ERM")
    assert [cell["mean"] for cell in row["cells"]] == [None, pytest.approx(20), None]
    assert data["missing"][0]["test_envs"] == [0, 2]
    text = print_as("text", sweep.root)
    assert "[1] ERM on red: not launched (trial 0, hparams_seed 0, with blue held out too)." in text
    assert "[2] ERM on blue: not launched (trial 0, hparams_seed 0, with red held out too)." in text


def test_many_missing_jobs_of_one_cell_are_summed_up(sweep):
    sweep.run("ERM", [0], ONE)
    for seed in range(1, 21):
        sweep.plan("ERM", [0], hparams_seed=seed)
    sweep.write_plan()
    text = print_as("text", sweep.root)
    first = "trial 0, hparams_seed 1; trial 0, hparams_seed 2; trial 0, hparams_seed 3"
    assert f"[1] ERM on red: not launched ({first}; and 17 more)." in " ".join(text.split())


def test_without_a_plan_a_missing_trial_is_a_footnote(sweep):
    for trial in range(2):
        for env in range(3):
            if (trial, env) != (1, 2):
                sweep.run("ERM", [env], ONE, trial_seed=trial)
    text = print_as("text", sweep.root)
    assert "[1] ERM on env2 (n = 1): no run (trial 1)." in text
    assert read_json(sweep.root)["missing"] == []


def test_several_data_sets_have_a_table_of_averages(sweep, make_sweep):
    for trial in range(2):
        for env in range(3):
            sweep.run("ERM", [env], {10: [(0.3 + trial / 10, 0.5)] * 3}, trial_seed=trial)
    other = make_sweep(sweep.root, ["p", "q"], "Other")
    for env in range(2):
        other.run("ERM", [env], {10: [(0.6, 0.5)] * 2})
    sweep.jobs += other.jobs
    sweep.all_environments |= other.all_environments
    sweep.write_plan(datasets=["Toy", "Other"])
    lines = print_as("text", sweep.root).splitlines()
    start = lines.index("Averages: training-domain validation")
    assert lines[start + 4 : start + 6] == ["      Toy          Other   average", "ERM   35.0 ± 5.0   60.0    47.5"]
    assert "Averages" not in print_as("json", sweep.root)
