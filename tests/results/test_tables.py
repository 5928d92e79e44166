"""Tables: numbers by hand, what is missing, teachers, and every format."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from daft_domainbed.results.records import read_sweep
from daft_domainbed.results.tables import FORMATS, build_results, to_json, trace_teachers

ONE = {10: [(0.5, 0.5)] * 3}

GOLDEN = """\
Toy: training-domain validation
Accuracy in percent on the in-split of the held-out domain, mean ± standard error, n = 2 trials.
Chosen: the checkpoint with the best mean out-split accuracy over the training domains.

       red           green         blue         average
ERM    60.5 ± 0.5    61.5 ± 0.5    62.5 ± 0.5   61.5
KD     62.5 ± 0.5    63.5 ± 0.5    64.5 ± 0.5   63.5
DAFT   65.5 ± 0.5*   66.5 ± 0.5*   68.0* [1]    66.7*
-------------------------------------------------------
teachers
ERM    70.0 ± 0.0    71.0 ± 0.0    72.0 ± 0.0   71.0
AFT    75.0 ± 0.0    76.0 ± 0.0    77.0 [2]     76.0
"""


def read_json(root: Path) -> dict:
    return to_json(build_results(read_sweep(root)))


def find_row(data: dict, selection: str, algorithm: str, role: str = "student") -> dict:
    (table,) = [table for table in data["tables"] if table["selection"] == selection]
    (row,) = [row for row in table["rows"] if (row["algorithm"], row["role"]) == (algorithm, role)]
    return row


def print_as(name: str, root: Path) -> str:
    return FORMATS[name](build_results(read_sweep(root)))


def find_job(sweep, algorithm: str, env: int, trial: int, stage: str = "student") -> dict:
    (job,) = [
        job
        for job in sweep.jobs
        if (job["stage"], job["args"]["algorithm"]) == (stage, algorithm)
        and (job["args"]["test_envs"], job["args"]["trial_seed"]) == ([env], trial)
    ]
    return job


def test_schema_and_numbers(full_sweep):
    data = read_json(full_sweep.root)
    assert list(data) == ["schema", "tables", "missing"]
    assert (data["schema"], data["missing"]) == (1, [])
    selections = ["training-domain", "leave-one-domain-out", "oracle"]
    assert [(table["dataset"], table["selection"]) for table in data["tables"]] == [
        ("Toy", name) for name in selections
    ]
    table = data["tables"][0]
    assert list(table) == ["dataset", "selection", "environments", "rows"]
    assert table["environments"] == ["red", "green", "blue"]
    assert [(row["algorithm"], row["role"]) for row in table["rows"]] == [
        ("ERM", "student"),
        ("KD", "student"),
        ("DAFT", "student"),
        ("ERM", "teacher"),
        ("AFT", "teacher"),
    ]
    daft = table["rows"][2]
    assert list(daft) == ["algorithm", "role", "cells", "average"]
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


def test_rows_are_in_the_order_asked_for_else_ours_first(sweep):
    for algorithm in ("Mixup", "DAFT", "IRM", "KD", "ERM"):
        sweep.run(algorithm, [0], ONE)
    rows = read_json(sweep.root)["tables"][0]["rows"]
    assert [row["algorithm"] for row in rows] == ["ERM", "KD", "DAFT", "IRM", "Mixup"]
    sweep.write_plan(algorithms=["KD", "IRM", "ERM"])
    rows = read_json(sweep.root)["tables"][0]["rows"]
    assert [row["algorithm"] for row in rows] == ["KD", "IRM", "ERM", "DAFT", "Mixup"]


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


def test_many_missing_jobs_of_one_cell_are_summed_up(sweep):
    sweep.run("ERM", [0], ONE)
    for seed in range(1, 21):
        sweep.plan("ERM", [0], hparams_seed=seed)
    sweep.write_plan()
    text = print_as("text", sweep.root)
    first = "trial 0, hparams_seed 1; trial 0, hparams_seed 2; trial 0, hparams_seed 3"
    assert f"[1] ERM on red: not launched ({first}; and 17 more)." in " ".join(text.split())


def test_a_sweep_that_has_only_begun(sweep):
    for env in range(3):
        teacher = sweep.plan("ERM", [env], "erm_teacher")
        sweep.plan("KD", [env], needs=[teacher])
    sweep.write_plan()
    data = read_json(sweep.root)
    assert len(data["missing"]) == 6
    assert find_row(data, "oracle", "KD")["average"] is None
    assert find_row(data, "oracle", "ERM", "teacher")["cells"][2]["mean"] is None
    assert "[1] KD on red: waiting for teacher" in print_as("text", sweep.root)
    for name in FORMATS:
        assert print_as(name, sweep.root)


def test_without_a_plan_a_missing_trial_is_a_footnote(sweep):
    for trial in range(2):
        for env in range(3):
            if (trial, env) != (1, 2):
                sweep.run("ERM", [env], ONE, trial_seed=trial)
    text = print_as("text", sweep.root)
    assert "[1] ERM on env2 (n = 1): no run (trial 1)." in text
    assert read_json(sweep.root)["missing"] == []


def test_text_in_full(full_sweep):
    """The golden table: DAFT without one trial, so with a footnote, its AFT teacher likewise."""
    shutil.rmtree(full_sweep.root / find_job(full_sweep, "DAFT", 2, 0)["folder"])
    text = print_as("text", full_sweep.root)
    footnotes = """\
[1] DAFT on blue (n = 1): not launched (trial 0, hparams_seed 0).
[2] AFT teacher on blue (n = 1): no student of it is done (trial 0).
"""
    oracle = GOLDEN.replace("training-domain validation", "test-domain validation (oracle)").replace(
        "Chosen: the checkpoint with the best mean out-split accuracy over the training domains.",
        "Chosen: the last checkpoint; hyperparameters by the out-split of the held-out domain itself, so not\n"
        "a fair comparison.",
    )
    end = """\
* best student of its column
Not done, so counted nowhere: 1 of 30 planned jobs.
Toy: leave-one-domain-out cross-validation needs runs with every pair of domains held out; this
  sweep holds out single domains only, so there is no such table.
"""
    assert text == f"{GOLDEN}\n{footnotes}\n{oracle}\nFootnotes as above.\n\n{end}"


def test_a_single_trial_has_no_standard_error(sweep):
    sweep.run("ERM", [0], ONE)
    cell = find_row(read_json(sweep.root), "oracle", "ERM")["cells"][0]
    assert (cell["mean"], cell["stderr"], cell["n"]) == (50.0, None, 1)
    for name in ("text", "markdown", "latex"):
        printed = print_as(name, sweep.root)
        assert "±" not in printed
        assert r"\pm" not in printed
        assert "one trial" in printed


def test_the_best_is_better_than_another_and_may_be_two(sweep):
    sweep.run("ERM", [0], ONE)
    assert "*" not in print_as("text", sweep.root)
    sweep.run("KD", [0], ONE)
    assert "*" not in print_as("text", sweep.root)
    assert "textbf" not in print_as("latex", sweep.root)
    sweep.run("DAFT", [0], {10: [(0.4, 0.5)] * 3})
    assert print_as("text", sweep.root).count("50.0*") == 4  # ERM and KD, in two selections


def test_markdown(full_sweep):
    lines = print_as("markdown", full_sweep.root).splitlines()
    assert lines[0] == "### Toy: training-domain validation"
    assert "|  | red | green | blue | average |" in lines
    assert "| KD | 62.5 ± 0.5 | 63.5 ± 0.5 | 64.5 ± 0.5 | 63.5 |" in lines
    assert "| DAFT | **65.5 ± 0.5** | **66.5 ± 0.5** | **67.5 ± 0.5** | **66.5** |" in lines
    assert "| AFT teacher | 75.0 ± 0.0 | 76.0 ± 0.0 | 77.0 ± 0.0 | 76.0 |" in lines


def test_latex(full_sweep):
    text = print_as("latex", full_sweep.root)
    assert r"\toprule" in text and r"\bottomrule" in text
    assert r"Algorithm & red & green & blue & Average \\" in text
    assert r"DAFT & \textbf{65.5 $\pm$ 0.5} & \textbf{66.5 $\pm$ 0.5}" in text
    assert r"ERM teacher & 70.0 $\pm$ 0.0" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    assert "±" not in text


@pytest.mark.parametrize("name", ["latex", "markdown"])
def test_names_are_escaped(make_sweep, tmp_path, name):
    sweep = make_sweep(tmp_path / "s", [r"+90%_{a}\b", "b|c", "d&<e>"], "folder:my_$data~^#")
    sweep.run("ERM", [0], ONE)
    sweep.write_plan()
    text = print_as(name, sweep.root)
    if name == "latex":
        assert r"+90\%\_\{a\}\textbackslash{}b & b|c & d\&\textless{}e\textgreater{}" in text
        assert r"folder:my\_\$data\textasciitilde{}\textasciicircum{}\#" in text
    else:
        assert r"| +90%\_{a}\\b | b\|c | d\&\<e\> |" in text


def test_csv(full_sweep):
    shutil.rmtree(full_sweep.root / find_job(full_sweep, "DAFT", 2, 0)["folder"])
    rows = list(csv.DictReader(io.StringIO(print_as("csv", full_sweep.root))))
    assert len(rows) == 2 * 5 * 4  # selections asked for, rows, domains and the average
    (row,) = [r for r in rows if (r["selection"], r["algorithm"], r["env"]) == ("oracle", "DAFT", "blue")]
    assert (float(row["mean"]), row["stderr"], row["n"]) == (pytest.approx(68), "", "1")
    assert row["missing"] == "not launched (trial 0, hparams_seed 0)"
    (average,) = [r for r in rows if (r["selection"], r["algorithm"], r["env"]) == ("oracle", "KD", "average")]
    assert float(average["mean"]) == pytest.approx(63.5)


def test_json_does_not_depend_on_the_place(full_sweep, tmp_path):
    """A copied sweep tells the same, failures and teachers named by a path included."""
    root = full_sweep.root
    failed = root / find_job(full_sweep, "KD", 0, 0)["folder"]
    (failed / "done").unlink()
    (failed / "failed").write_text(f"no such file: {root.resolve()}/teachers/x\n")
    daft = root / find_job(full_sweep, "DAFT", 0, 0)["folder"] / "results.jsonl"
    daft.write_text(daft.read_text().replace('"lr": 0.001', f'"teacher": "{root}/teachers/x"'))
    before = print_as("json", root)
    shutil.copytree(root, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(root)
    assert print_as("json", tmp_path / "elsewhere" / "copy") == before
    assert str(tmp_path) not in before
    assert before.count('"teacher": "teachers/x"') == 2
    assert '"reason": "failed: no such file: teachers/x"' in before


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
