"""The tables of docs/robustness.md are what the committed records say."""

from __future__ import annotations

from pathlib import Path

from tools import archives, robustness


def test_page_is_what_the_records_say() -> None:
    page, records = robustness.PAGE.read_text(encoding="utf-8"), archives.read_records(robustness.RECORDS)
    assert robustness.fill_page(page, records) == page, "make pages"
    assert len(records) > 20
    assert robustness.fill_page(page.replace("| 4 |", "| 5 |"), records) == page


def test_records_are_added_to(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl.xz"
    assert archives.read_records(path) == []
    for number in (1, 2):
        archives.add_records([{"kind": "other", "number": number}], path)
    assert [record["number"] for record in archives.read_records(path)] == [1, 2]


def test_rows_are_means_over_models() -> None:
    shared = {"algorithm": "ERM", "environments": ["a", "b"], "test_envs": [0], "attacks": [], "ood": None}
    shared |= {"cost": {"seconds": 10.0, "peak_memory_mb": 500.0}, "corruptions": None, "calibration": {"ece": 0.25}}
    models = [shared | {"clean": {"a": clean, "b": 0.0}, "worst_class": {"a": 5.0}} for clean in (40.0, 60.0)]
    curve = {"norm": "linf", "attack": "minimal", "env": "a", "eps": robustness.SHOWN}
    models[0]["curves"] = models[1]["curves"] = [curve | {"accuracy": [50.0] * 6 + [0.0]}]
    records = [{"kind": "evaluation", "role": "teacher", "model": model} for model in models]
    table = robustness.make_models_table(records).splitlines()
    assert table[0] == "|  | models | clean held-out | worst class | ECE | seconds | peak MB |"
    assert table[2] == "| ERM (teacher) | 2 | 50.0 | 5.0 | 0.250 | 10.0 | 500 |"
    assert robustness.make_curves_table(records).splitlines()[2].endswith("| 50.0 | 0.000 |")


def test_ratios_are_of_medians() -> None:
    seconds = {"ours": [1.0, 9.0, 2.1], "plain": [2.0, 2.0, 7.0]}
    ratio = {
        "algorithm": "AT",
        "dataset": "D",
        "norm": "l2",
        "n": 8,
        "seconds": seconds,
        "left": {"ours": 3, "plain": 3},
    }
    row = robustness.make_ratios_table([{"kind": "ratio", "ratio": ratio}]).splitlines()[2]
    assert row == "| AT, D | l2 | 8 | 2.10 | 2.00 | 1.050 | 3, 3 |"
