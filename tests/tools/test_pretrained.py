"""The section on pretrained students: empty without records, and its numbers worked out by hand with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tools.test_claim import write_lot
from tools import claim, pretrained
from tools.study import Study, show_equivalence
from tools.trials import pack

TRIALS = range(6)
MEASURED = ("accuracy", "nll", "margin", "agreement", "entropy")
NOISE = (2.0, -1.9, 1.5, -1.4, 0.9, -1.0)
# What each arm has more than ERM's 40 percent: averaged weights always a point more.
GAINS = {"erm": [0.0] * 6, "kd": [0.5] * 6, "kd_matched": [2.0 + noise for noise in NOISE], "daft": [2.0] * 6}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The runs of the four main arms, with averaged weights."""
    root = tmp_path / "runs"
    for name, gains in GAINS.items():
        write_lot(root, name, name.split("_")[0].upper(), {trial: 40 + gains[trial] for trial in TRIALS})
        for file in (root / name).glob("*/results.jsonl"):
            records = [json.loads(line) for line in file.read_text().splitlines()]
            lines = [json.dumps(record | make_averaged(record)) for record in records]
            file.write_text("\n".join(lines) + "\n")
    return root


def make_averaged(record: dict[str, Any]) -> dict[str, float]:
    return {f"averaged_{key}": value + 0.01 for key, value in record.items() if key.endswith("_acc")}


def test_without_records_there_is_no_section(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    assert pretrained.show_study(tmp_path, tmp_path) == ""


def test_the_section_is_what_the_records_say(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tmp_path / "study"
    shutil.copytree(claim.PRETRAINED / "report", study / "report")
    shutil.copy(claim.PRETRAINED / "report.md.j2", study)
    for trial in TRIALS:
        folders = [
            file.parent
            for file in runs.glob("*/*/results.jsonl")
            if json.loads(file.read_text().splitlines()[0])["args"]["trial_seed"] == trial
        ]
        costs = json.dumps({"sweeps": [{"seconds": 600.0}]})
        lines = [
            {"kind": kind, "radius": radius, "backbone": "a", "trial": trial, **dict.fromkeys(MEASURED, value + trial)}
            for kind, radius, value in (("ERM", None, 1.0), ("AFT", 0.3, 3.0), ("AFT", 0.3, 5.0), ("AFT", 0, 1.0))
        ]
        measures = "".join(json.dumps(line) + "\n" for line in lines)
        pack(folders, {"costs.json": costs, "teachers.jsonl": measures}, study / "records" / f"trial_{trial}.tar.xz")
    monkeypatch.setattr(pretrained, "check_records", lambda archives, report: None)
    text = pretrained.show_study(study, tmp_path)
    assert "| DAFT | 43.0 ± 0.0 | 53.0 ± 0.0 | 48.0 ± 0.0 | 6 |" in text  # 40 + 2 + 1, and 10 more on green
    assert "| DAFT | 42.0 ± 0.0 | 52.0 ± 0.0 | 47.0 ± 0.0 | 6 |" in text
    assert "| DAFT - ERM | +2.00 [+2.00, +2.00] | 0.0312 |" in text
    assert "| KD - ERM | +0.5 | +0.5 |" in text
    assert "the trials took 1.0 hours" in text
    assert "| ERM | 3.5 | 3.5 | 3.5 | 3.5 | 3.5 | 6 |" in text
    assert "| AFT, radius 0.3 - ERM | +3 [+3, +3] |" in text
    assert "| AFT, radius 0 - ERM | +0 [+0, +0] |" in text
    drawing = (tmp_path / pretrained.FIGURE).read_text()
    assert f"figures/{pretrained.FIGURE}" in text and drawing.count("<circle") == 2 * len(MEASURED)
    assert "`daft_eps0`" in text.split("Planned and not run")[1].split("\n")[0]


def test_equivalence_by_hand(runs: Path, tmp_path: Path) -> None:
    root = tmp_path / "all"
    (root / "development").mkdir(parents=True)
    shutil.copytree(runs, root / "report")
    write_lot(root / "report", "same", "DAFT", dict.fromkeys(TRIALS, 42.0))
    pairs = {"a": ("daft", "same"), "b": ("kd", "erm"), "c": ("daft", "erm"), "d": ("daft", "kd_matched")}
    rows = [row.split(" | ") for row in show_equivalence(Study(root), pairs, 1.0).splitlines()[2:]]
    assert [row[2] for row in rows] == [
        "equivalent", "different, by less than the margin", "different", "not resolved",
    ]  # fmt: skip
    assert rows[1][1] == "[+0.50, +0.50]"
