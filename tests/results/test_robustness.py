from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.cli import run_command
from daft_domainbed.results.robustness import FORMATS, build_robustness, format_radius
from daft_domainbed.results.sweeps import read_sweep

ENVS = ["red", "green", "blue"]


def write_evaluation(folder: Path, held_out: int, clean: float, **changes: Any) -> None:
    """An evaluation whose numbers of other domains would be seen if they were taken."""
    env = ENVS[held_out]
    shared = {"env": env, "norm": "linf", "eps": 4 / 255}
    model = {
        "environments": ENVS,
        "clean": {name: clean if name == env else 1.0 for name in ENVS},
        "worst_class": {name: clean - 20 if name == env else 1.0 for name in ENVS},
        "attacks": [
            {**shared, "name": "pgd-50", "accuracy": clean - 10},
            {**shared, "name": "pgd-50x3", "accuracy": clean - 15},
            {**shared, "env": ENVS[held_out - 1], "name": "pgd-50x3", "accuracy": 1.0},
            {**shared, "name": "pgd-50", "norm": "l2", "eps": 0.5, "accuracy": clean - 5},
        ],
        "corruptions": None,
        "calibration": {"ece": 0.1},
        "ood": [{"set": "noise", "score": "msp", "auroc": 0.9}, {"set": "noise", "score": "energy", "auroc": 0.1}],
        **changes,
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(model))


@pytest.fixture
def judged(sweep: Any) -> Any:
    """Two trials of ERM on the first two domains, all evaluated but one."""
    accs = {0: [(0.5, 0.5)] * 3, 10: [(0.6, 0.6)] * 3}
    for trial in (0, 1):
        for env in (0, 1):
            folder = sweep.run("ERM", [env], accs, trial_seed=trial)
            if (trial, env) != (1, 1):
                write_evaluation(sweep.root / folder, env, 60 + 10 * env + 2 * trial)
    sweep.write_plan(datasets=["Toy"], algorithms=["ERM"])
    return sweep


def test_cells_are_means_over_complete_trials(judged: Any) -> None:
    tables, notes = build_robustness(read_sweep(judged.root))
    (row,) = tables[0].rows
    assert (tables[0].dataset, row.algorithm, row.role) == ("Toy", "ERM", "student")
    found = {name: list(value.numbers) for name, value in row.values.items()}
    assert found == {
        "clean held-out": [65.0],  # of domains 60 and 70; the second trial lacks one
        "worst class": [45.0],
        "robust at linf 4/255": [50.0],  # under the strongest attack
        "robust at l2 0.5": [60.0],
        "ECE": [0.1],
        "AUROC": [0.9],
    }
    assert [note.why.split(":")[0] for note in notes] == ["was chosen and is not evaluated"]


def test_spread_is_over_trials(judged: Any) -> None:
    write_evaluation(judged.root / judged.jobs[-1]["folder"], 1, 72.0)
    tables, notes = build_robustness(read_sweep(judged.root))
    value = tables[0].rows[0].values["clean held-out"]
    assert (list(value.numbers), value.mean, value.stderr) == ([65.0, 67.0], 66.0, 1.0)
    assert notes == []


def test_every_format_says_the_same(judged: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("collect_results", ["--input_dir", str(judged.root), "--robustness", "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["schema"] == 1
    (table,) = content["robustness"]
    assert table["rows"][0]["values"]["clean held-out"] == {"mean": 65.0, "stderr": None, "n": 1}
    tables, _ = build_robustness(read_sweep(judged.root))
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](tables))))
    assert {row["column"]: float(row["mean"]) for row in rows}["robust at linf 4/255"] == 50
    for name in ("text", "markdown"):
        text = FORMATS[name](tables)
        assert "65.0 (1)" in text
        assert "robust at linf 4/255" in text


def test_what_an_evaluation_lacks_or_garbles_is_left_out(judged: Any) -> None:
    folder = judged.root / judged.jobs[0]["folder"]
    (folder / "evaluation" / "evaluation.json").write_text('{"environments": ["red"], "clean": 3, "attacks": [7, {}]}')
    tables, _ = build_robustness(read_sweep(judged.root))
    assert tables[0].rows == []
    (folder / "evaluation" / "evaluation.json").write_text("nonsense")
    _, notes = build_robustness(read_sweep(judged.root))
    assert len(notes) == 2


def test_it_is_a_table_of_its_own(judged: Any, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--input_dir", str(judged.root), "--robustness", "--compare", "ERM", "KD"]
    assert run_command("collect_results", argv) == 2
    assert "--robustness" in capsys.readouterr().err


def test_the_report_draws_curves_and_reliability_where_they_exist(judged: Any) -> None:
    from daft_domainbed.results.report import render
    from daft_domainbed.results.tables import build_results

    plain = render(build_results(read_sweep(judged.root)))
    assert "Robustness and calibration" not in plain
    assert "Right under attack" not in plain
    curve = {"env": "red", "norm": "linf", "attack": "pgd", "eps": [0, 4 / 255, 1], "accuracy": [60, 30, 0]}
    diagram = {"confidence": [0.5, 0.9], "accuracy": [0.5, 1.0], "count": [3, 1]}
    folder = judged.root / judged.jobs[0]["folder"]
    path = folder / "evaluation" / "evaluation.json"
    model = json.loads(path.read_text())
    model |= {"curves": [curve], "calibration": {"ece": 0.1, "reliability": {"before": diagram}}}
    path.write_text(json.dumps(model))
    html = render(build_results(read_sweep(judged.root)))
    assert "Right under attack, by the radius in linf (pgd)" in html
    assert "M30.0 60.0L161.0 99.0L292.0 138.0" in html  # 60, 30 and 0 percent at equal distances
    assert "Reliability of all examples" in html
    assert "M161.0 73.0L265.8 8.0" in html  # 50 % right at confidence 0.5, all at 0.9


@pytest.mark.parametrize(("eps", "text"), [(8 / 255, "8/255"), (0.3, "0.3"), (3, "3"), (0.0123, "0.0123")])
def test_radii_are_written_as_people_do(eps: float, text: str) -> None:
    assert format_radius(eps) == text
