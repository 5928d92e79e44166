from __future__ import annotations

import json
from pathlib import Path

import pytest

from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.journal import JOURNAL_FILE, Journal

SETTINGS = {"suite": "quick", "seed": 0, "images": {"a": "1"}}


def test_findings_are_there_again(tmp_path: Path) -> None:
    with Journal(tmp_path, SETTINGS) as journal:
        journal.put("clean", {"labels": [1, 2]}, seconds=1.5, peak=10, machine={"cpu": "a"})
        journal.put("grid", [None, 0.5], seconds=0.5, peak=30, machine={"cpu": "a"})
    with Journal(tmp_path, SETTINGS) as journal:
        assert journal.findings == {"clean": {"labels": [1, 2]}, "grid": [None, 0.5]}
        assert (journal.seconds, journal.peak) == ({"clean": 1.5, "grid": 0.5}, 30)
        assert journal.machine == {"cpu": "a"}
        journal.put("pgd", 1, 0, 0, {"cpu": "b"})
    with Journal(tmp_path, SETTINGS) as journal:
        assert journal.machine == {"cpu": "b"}


def test_what_was_half_written_is_forgotten_and_written_over(tmp_path: Path) -> None:
    with Journal(tmp_path, SETTINGS) as journal:
        journal.put("clean", 1, 0, 0, "here")
        journal.put("grid", 2, 0, 0, "here")
    path = tmp_path / JOURNAL_FILE
    text = path.read_bytes()
    for cut in range(len(text)):
        path.write_bytes(text[:cut])
        with Journal(tmp_path, SETTINGS) as journal:
            n_whole = text[:cut].count(b"\n")
            assert len(journal.findings) == max(0, n_whole - 2)  # settings and machine
            for name, finding in (("clean", 1), ("grid", 2)):
                if name not in journal.findings:
                    journal.put(name, finding, 0, 0, "here")
        assert path.read_bytes() == text


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("suite", "full", "suite quick"), ("seed", 1, "seed 0"), ("images", {"a": "2"}, "the data have changed")],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, name: str, value: object, said: str) -> None:
    Journal(tmp_path, SETTINGS).file.close()
    before = (tmp_path / JOURNAL_FILE).read_bytes()
    with pytest.raises(UsageError, match=said):
        Journal(tmp_path, SETTINGS | {name: value})
    assert (tmp_path / JOURNAL_FILE).read_bytes() == before


@pytest.mark.parametrize("line", ["nonsense", "[]", json.dumps({"name": "clean"}), "1"])
def test_a_damaged_journal_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / JOURNAL_FILE).write_text(json.dumps({"settings": SETTINGS}) + f"\n{line}\n")
    with pytest.raises(UsageError, match="damaged"):
        Journal(tmp_path, SETTINGS)
