"""What a paper takes from a sweep: comparisons in every format, names and captions, the checklist, figures."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from daft_domainbed.cli import run_command
from daft_domainbed.errors import UsageError
from daft_domainbed.results.grids import escape_latex, write_latex_text
from daft_domainbed.results.sweeps import read_sweep, read_sweeps
from daft_domainbed.results.tables import build_results
from tests.results.conftest import fill_full_sweep, find_job, find_row, read_json

Show = Callable[..., str]


@pytest.fixture
def show(sweep, capsys: pytest.CaptureFixture[str]) -> Show:
    """Runs collect_results on the sweep; returns what it prints, or its last line where it fails."""

    def run(*flags: str, status: int = 0) -> str:
        capsys.readouterr()
        assert run_command("collect_results", ["--input_dir", str(sweep.root), *flags]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


def test_standard_error_of_the_average_is_over_trials_of_means(sweep) -> None:
    """KD has 62 + env + trial in trial and domain: means over domains 63 and 64, whose standard error is 0.5."""
    fill_full_sweep(sweep, trials=2)
    assert find_row(read_json(sweep.root), "training-domain", "KD")["average_stderr"] == pytest.approx(0.5)
    shutil.rmtree(sweep.root / find_job(sweep, "KD", 2, 0)["folder"])  # now one trial alone is complete
    assert find_row(read_json(sweep.root), "training-domain", "KD")["average_stderr"] is None


def test_comparisons_in_every_format(sweep, show: Show) -> None:
    fill_full_sweep(sweep, trials=6)
    compare = ("--compare", "DAFT", "KD", "ERM", "--format")
    markdown = show(*compare, "markdown").splitlines()
    assert markdown[2] == "|  | gain | 95 % interval | p | p, corrected | n | red | green | blue |"
    assert markdown[4] == "| DAFT - KD | +3.0 | \\[+3.0, +3.0\\] | 0.031 | 0.062 | 6 | +3.0 | +3.0 | +3.0 |"
    latex = show(*compare, "latex")
    assert r"DAFT - ERM & +5.0 & [+5.0, +5.0] & 0.031 & 0.062 & 6 & +5.0 & +5.0 & +5.0 \\" in latex
    assert r"\caption{Toy: training-domain validation, gains in points, paired by trial. p: two-sided" in latex
    rows = list(csv.DictReader(io.StringIO(show(*compare, "csv"))))
    assert [(row["second"], row["env"]) for row in rows][:5] == [
        *(("KD", env) for env in ("average", "red", "green", "blue")),
        ("ERM", "average"),
    ]
    assert float(rows[0]["p"]) == 2 / 64 and float(rows[0]["low"]) == pytest.approx(3) and rows[1]["p"] == ""
    assert json.loads(show(*compare, "json"))[0]["p"] == 2 / 64
    assert "DAFT - KD: +3.0 [+3.0, +3.0], p 0.031" in show(*compare, "text")


def test_losses_have_a_minus_in_latex_and_few_trials_no_interval(sweep, show: Show) -> None:
    fill_full_sweep(sweep, trials=2)
    latex = show("--compare", "ERM", "KD", "--format", "latex", "--dataset_name", "Toys & more")
    assert r"ERM - KD & $-$2.0 & -- & 0.500 & 0.500 & 2 & $-$2.0 & $-$2.0 & $-$2.0 \\" in latex
    assert r"Toys \& more: training-domain" in latex and "no interval below 6 trials" in latex


def test_selection_name_and_caption(sweep, show: Show) -> None:
    fill_full_sweep(sweep, trials=2)
    flags = ("--selection", "oracle", "--dataset_name", "My toys", "--caption", "Accuracy of 100 % toys.")
    latex = show(*flags, "--format", "latex")
    assert latex.count(r"\begin{table}") == 1 and r"\caption{Accuracy of 100 \% toys.}" in latex
    text = show(*flags)
    assert text.startswith("My toys: test-domain validation (oracle)\nAccuracy of 100 % toys.\n")
    assert "Toy:" not in text
    assert show("--selection", "training-domain", "--format", "csv").splitlines()[1].startswith("Toy,training-domain,")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--caption", "x"], "--caption would stand over 2 tables: choose one with --selection"),
        (["--dataset_name", "Tuy=x"], "--dataset_name Tuy=...: no such data set. Did you mean 'Toy'?"),
        (["--dataset_name", "a", "b"], "--dataset_name a: there are 1 data sets, so write Toy=NAME"),
        (["--checklist", "--compare", "DAFT", "KD"], "--compare and --checklist each give something of their own"),
        (["--checklist", "--caption", "x"], "--caption is of the table of accuracies, not of --checklist"),
    ],
)
def test_flags_that_say_nothing_are_refused(sweep, show: Show, flags: list[str], message: str) -> None:
    fill_full_sweep(sweep, trials=1)
    if flags == ["--dataset_name", "Tuy=x"]:
        with pytest.raises(UsageError, match="no such data set"):
            from daft_domainbed.results.tables import present

            present(build_results(read_sweep(sweep.root)), names={"Tuy": "x"})
        return
    assert message in show(*flags, status=2)


def test_checklist(sweep, show: Show) -> None:
    fill_full_sweep(sweep, trials=2)
    sweep.run(
        "ERM", [0], {0: [(0.1, 0.1)] * 3, 10: [(0.2, 0.2)] * 3}, hparams={"lr": 0.5}, hparams_seed=1,
        first={"size": {"parameters": 19_560, "multiply_adds": 1_430_000}}, last={"seconds": 30.0},
    )  # fmt: skip
    setting = {"dataset": "Toy", "algorithm": "KD", "test_env": None, "trial_seed": 1, "hparams_seed": 3}
    chosen = {"from": "../search", "settings": [setting | {"hparams": {"lr": 0.25}}]}
    sweep.write_plan(datasets=["Toy"], algorithms=["ERM", "KD", "DAFT"], hparams='{"x": 1}', chosen=chosen)
    found = json.loads(show("--checklist", "--format", "json"))
    erm, kd, daft, erm_teacher, aft_teacher = found["entries"]
    assert (erm["algorithm"], erm["n_trials"], erm["n_domains"], erm["jobs"], erm["draws"]) == ("ERM", 2, 3, 7, 2)
    assert (erm["searched"], erm["steps"], erm["evaluations"]) == (["lr"], [11], 2)
    assert erm["total_seconds"] == 6 * 10 + 30 and erm["seconds"] == 10
    assert erm["chosen"] == "by validation, in each trial and domain"
    assert kd["chosen"] == "draw 3 of trial 1 in ../search (lr 0.25)" and daft["chosen"] == "defaults"
    assert (erm_teacher["role"], erm_teacher["n_trials"], aft_teacher["total_seconds"]) == ("teacher", None, 6 * 20)
    assert 'set by hand: {"x": 1}' in found["notes"] and "cpu: a CPU" in found["notes"]
    text = show("--checklist")
    assert "ERM teacher" in text and "draw 3 of trial 1 in ../search" in text
    latex = show("--checklist", "--format", "latex")
    assert r" & ERM & KD & DAFT & ERM teacher & AFT teacher \\" in latex and r"jobs & 7 & 6 & 6 & 6 & 6 \\" in latex
    assert r" & draw 3 of trial 1 in ../\allowbreak{}search (lr 0.25) & defaults & as given & as given \\" in latex
    assert show("--checklist", "--format", "csv").splitlines()[0].startswith("dataset,algorithm,role,n_trials,")
    assert "| KD | 2 | 3 | 6 |" in show("--checklist", "--format", "markdown")


@pytest.mark.parametrize("flags", [(), ("--compare", "DAFT", "KD"), ("--checklist",)])
def test_latex_tables_are_no_wider_than_the_text(sweep, show: Show, flags: tuple[str, ...]) -> None:
    """Each tabular is the content of a box that shrinks to the line; pages compiled by a LaTeX: docs/whole_way.md."""
    fill_full_sweep(sweep, trials=1)
    latex = show(*flags, "--format", "latex")
    box = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%" + "\n" + r"\begin{tabular}"
    assert latex.count(box) == latex.count(r"\end{tabular}}") == latex.count(r"\begin{table}") > 0
    assert latex.startswith(r"% Needs \usepackage{array,booktabs,graphicx}.")


def test_lines_of_latex_may_break_inside_long_names() -> None:
    text = 'a_b/c {"lr":1,"x":"y"} at 10:30, 1/2'
    broken = write_latex_text(text)
    assert broken == r'a\_\allowbreak{}b/\allowbreak{}c \{"lr":1,\allowbreak{}"x":"y"\} at 10:30, 1/2'
    assert broken.replace(r"\allowbreak{}", "") == escape_latex(text)


def test_figures_are_two_files_each_and_a_function_of_the_records(sweep, show: Show, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fill_full_sweep(sweep, trials=2)
    printed = show("--figures", str(tmp_path / "a"), "--dataset_name", "My toys").split("\n")[:-1]
    names = [f"My_toys-training-domain-{what}" for what in ("domains", "teachers", "curves")]
    assert printed == [str(tmp_path / "a" / f"{name}.{kind}") for name in names for kind in ("svg", "pdf")]
    svg = Path(printed[0]).read_text()
    assert "± standard error" in svg and ">DAFT<" in svg and ">average<" in svg
    show("--figures", str(tmp_path / "b"), "--dataset_name", "My toys")
    for path in printed:
        assert Path(path).read_bytes() == (tmp_path / "b" / Path(path).name).read_bytes()


def test_gain_against_student_size_where_sweeps_have_several(
    make_sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gains of the last algorithm: 10 points over KD and 20 over ERM at the small size, 20 and 40 at the large one."""
    pytest.importorskip("matplotlib")
    from daft_domainbed.results import figures

    roots = [tmp_path / "small", tmp_path / "large"]
    for i, (root, size) in enumerate(zip(roots, (20_000, 80_000), strict=True), 1):
        own = make_sweep(root)
        hparams = {"backbone": f"resnet8_w{8 * i}"}
        for algorithm, acc in (("ERM", 0.5), ("KD", 0.5 + 0.1 * i), ("DAFT", 0.5 + 0.2 * i)):
            for env in range(3):
                records = {10: [(acc, 0.5)] * 3}
                first = {"size": {"parameters": size, "multiply_adds": 1}}
                own.run(algorithm, [env], records, hparams=hparams, first=first)
        own.write_plan(datasets=["Toy"], algorithms=["ERM", "KD", "DAFT"])
    flags = ["--figures", str(tmp_path / "figures"), "--input_dir"]
    assert run_command("collect_results", [*flags, *map(str, roots)]) == 0
    svg = tmp_path / "figures" / "Toy-training-domain-sizes.svg"
    assert str(svg) in capsys.readouterr().out and "gain of DAFT over, points" in svg.read_text()

    one, both = (build_results(read_sweeps(folders)).tables[0] for folders in (roots[:1], roots))
    assert figures._draw_sizes(one, one.rows) is None
    figure = figures._draw_sizes(both, both.rows)
    assert figure
    lines = {kind.get_label(): kind[0].get_xydata().round(6).tolist() for kind in figure.axes[0].containers}
    assert lines == {"ERM": [[20_000, 20], [80_000, 40]], "KD": [[20_000, 10], [80_000, 20]]}


def test_without_matplotlib_it_says_what_to_install(sweep, show: Show, monkeypatch, tmp_path: Path) -> None:
    import sys

    fill_full_sweep(sweep, trials=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--figures needs matplotlib: pip install" in show("--figures", str(tmp_path), status=2)


def test_sizes_of_networks_stand_below_the_table(sweep, show: Show) -> None:
    size, teacher = (
        {"parameters": 19_935, "multiply_adds": 991_456},
        {"parameters": 309_351, "multiply_adds": 13_206_400},
    )
    for algorithm in ("ERM", "KD"):
        first = {"size": size, "teacher": {"algorithm": "ERM", "path": "../t", "size": teacher}}
        sweep.run(algorithm, [0], {10: [(0.5, 0.5)] * 3}, first=first if algorithm == "KD" else {"size": size})
    words = "0.020 M parameters, 0.99 M multiply-adds; ERM teacher: 0.31 M parameters, 13.2 M multiply-adds."
    assert show().count("Networks: ERM, KD: 0.020 M parameters") == 1
    for form in ("markdown", "latex"):
        assert f"Networks: ERM, KD: {words}" in show("--format", form)
