"""Formats: the same tables as text, Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import shutil

import pytest

from daft_domainbed.results.formats import FORMATS
from tests.results.conftest import find_job, find_row, print_as, read_json

ONE = {10: [(0.5, 0.5)] * 3}

GOLDEN = """\
Toy: training-domain validation
Accuracy in percent on the in-split of the held-out domain, mean ± standard error, n = 2 trials.
Chosen: the checkpoint with the best mean out-split accuracy over the training domains.

       red           green         blue         average
ERM    60.5 ± 0.5    61.5 ± 0.5    62.5 ± 0.5   61.5 ± 0.5
KD     62.5 ± 0.5    63.5 ± 0.5    64.5 ± 0.5   63.5 ± 0.5
DAFT   65.5 ± 0.5*   66.5 ± 0.5*   68.0* [1]    66.7*
----------------------------------------------------------
teachers
ERM    70.0 ± 0.0    71.0 ± 0.0    72.0 ± 0.0   71.0 ± 0.0
AFT    75.0 ± 0.0    76.0 ± 0.0    77.0 [2]     76.0
"""


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
Toy: leave-one-domain-out cross-validation needs runs with every pair of domains held out, too;
  these were not asked for, so there is no such table.
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
    assert print_as("text", sweep.root).count("50.0*") == 8  # ERM and KD and their averages, in two selections


def test_markdown(full_sweep):
    lines = print_as("markdown", full_sweep.root).splitlines()
    assert lines[0] == "### Toy: training-domain validation"
    assert "|  | red | green | blue | average |" in lines
    assert "| KD | 62.5 ± 0.5 | 63.5 ± 0.5 | 64.5 ± 0.5 | 63.5 ± 0.5 |" in lines
    assert "| DAFT | **65.5 ± 0.5** | **66.5 ± 0.5** | **67.5 ± 0.5** | **66.5 ± 0.5** |" in lines
    assert "| AFT teacher | 75.0 ± 0.0 | 76.0 ± 0.0 | 77.0 ± 0.0 | 76.0 ± 0.0 |" in lines


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
    assert (float(average["stderr"]), average["n"]) == (pytest.approx(0.5), "2")


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
