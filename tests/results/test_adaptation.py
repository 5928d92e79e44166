from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.cli import run_command
from daft_domainbed.results.adaptation import FORMATS, build_adaptations
from daft_domainbed.results.sweeps import read_sweep


def write_adaptation(folder: Path, env: int, acc: float, ratio: float) -> None:
    place = folder / "adaptation" / f"{env}-noise-{ratio:g}"
    place.mkdir(parents=True)
    outside = {"acc_n": acc + 10, "acc_h": acc + 5} if ratio else {"acc_n": None, "acc_h": None}
    facts = {"test_env": env, "strong_ood": "noise", "strong_ratio": ratio, "batch_size": 64}
    rows = [{"method": name, "acc_s": acc, **outside} for name in ("source", "owttt")]
    (place / "adaptation.json").write_text(json.dumps({"schema": 1, **facts, "rows": rows}))


@pytest.fixture
def adapted(sweep: Any) -> Any:
    """Two trials of ERM on two domains; the second trial lacks one closed set."""
    for trial in (0, 1):
        for env in (0, 1):
            folder = sweep.root / sweep.run("ERM", [env], {0: [(0.5, 0.5)] * 3}, trial_seed=trial)
            write_adaptation(folder, env, 50 + 10 * env + 4 * trial, 1.0)
            if (trial, env) != (1, 1):
                write_adaptation(folder, env, 70 + 10 * env, 0.0)
            (folder / "adaptation" / "damaged").mkdir()
            (folder / "adaptation" / "damaged" / "adaptation.json").write_text("{")
    sweep.write_plan(datasets=["Toy"], algorithms=["ERM"])
    return sweep


def test_cells_are_means_over_complete_trials(adapted: Any) -> None:
    (closed, noise), notes = build_adaptations(read_sweep(adapted.root))
    assert notes == []
    assert (closed.stream.strong_ratio, noise.stream) == (0, ("Toy", "noise", 1.0, 64))
    for table, wanted in (
        (closed, {"acc_s": [75.0]}),  # of 70 and 80
        (noise, {"acc_s": [55.0, 59.0], "acc_n": [65.0, 69.0], "acc_h": [60.0, 64.0]}),
    ):
        assert [(row.label, row.method) for row in table.rows] == [("ERM", "source"), ("ERM", "owttt")]
        for row in table.rows:
            assert {kind: list(value.numbers) for kind, value in row.values.items()} == wanted


def test_what_was_not_adapted_is_noted(adapted: Any) -> None:
    shutil.rmtree(adapted.root / adapted.jobs[0]["folder"] / "adaptation")
    tables, (note,) = build_adaptations(read_sweep(adapted.root))
    assert note.why.startswith("was chosen and is not adapted")
    assert [table.stream.strong_ratio for table in tables] == [1.0]  # no trial has every domain's closed set


def test_every_format_says_the_same(adapted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("collect_results", ["--input_dir", str(adapted.root), "--adaptation", "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["schema"] == 1
    closed, noise = content["adaptation"]
    assert closed["rows"][0]["values"] == {"acc_s": {"mean": 75.0, "stderr": None, "n": 1}}
    assert noise["rows"][1]["values"]["acc_n"] == {"mean": 67.0, "stderr": 2.0, "n": 2}
    tables, _ = build_adaptations(read_sweep(adapted.root))
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](tables))))
    assert [(row["strong_ratio"], row["method"], row["accuracy"], row["mean"]) for row in rows[:3]] == [
        ("0.0", "source", "acc_s", "75.0"),
        ("0.0", "owttt", "acc_s", "75.0"),
        ("1.0", "source", "acc_s", "57.0"),
    ]
    for form in ("text", "markdown"):
        text = FORMATS[form](tables).replace("\\", "")  # escapes of Markdown
        for said in ("Toy: 1 of noise to 1, batches of 64", "Toy: closed set", "57.0 ± 2.0 (2)", "75.0 (1)", "ACC_H"):
            assert said in text


def test_it_is_a_table_of_its_own(adapted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, said in ((["--format", "latex"], "give it alone"), (["--robustness"], "one at a time")):
        assert run_command("collect_results", ["--input_dir", str(adapted.root), "--adaptation", *flags]) == 2
        assert said in capsys.readouterr().err
