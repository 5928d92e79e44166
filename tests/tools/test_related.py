"""The page of the compared methods is what its records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daft_domainbed.results.statistics import flip_signs
from tools import related
from tools.related import COMPARISONS, Comparison, Study, choose_keys, pack, share_worst


def test_page_is_what_the_records_say() -> None:
    assert related.PAGE.read_text(encoding="utf-8") == related.render(related.RECORDS), "make pages"


def test_every_row_is_of_a_sweep_that_a_file_describes() -> None:
    said = "".join(path.read_text() for path in related.STUDY.glob("*/*.yaml"))
    for comparison in COMPARISONS.values():
        for sweep, algorithm in comparison.rows.values():
            assert sweep == "carot/teachers" or f"output_dir: runs/related/{sweep}\n" in said
            assert algorithm == "CLIP" or algorithm in said


def write_run(root: Path, sweep: str, trial: int, env: int, **measures: Any) -> None:
    folder = root / sweep / f"{measures['algorithm']}-{trial}-{env}"
    folder.mkdir(parents=True)
    teacher = {"algorithm": "ERM", "steps": 300}
    first = {"started": f"2026-11-28T0{trial}:00:00", "machine": {"commit": "abc", "torch": "2"}, "teacher": teacher}
    (folder / "results.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in (first, {"step": 399, "seconds": 10.0 + trial}))
    )
    (folder / "measures.json").write_text(json.dumps({"trial": trial, "env": env, "n": [4, 4]} | measures))
    (folder / "done").write_text("done")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """FAAL against its start in six trials: one image more of the worst class, and one less of the other."""
    for trial in range(6):
        for env in (0, 1) if trial < 5 else (0,):
            write_run(tmp_path, "at/ce", trial, env, algorithm="AT", clean=[4, 2], linf_pgd20=[3, 0])
            write_run(tmp_path, "faal", trial, env, algorithm="FAAL", clean=[3, 2], linf_pgd20=[2, 1])
    write_run(tmp_path, "faal", 6, 0, algorithm="FAAL", clean=[0, 0], linf_pgd20=[0, 0])  # without a start
    return tmp_path


def test_a_comparison_pairs_what_all_rows_have(runs: Path) -> None:
    lines = Study(runs).show("faal").splitlines()
    assert lines[0].startswith("n = 5 trials of 2 held-out domains")
    assert "| FAAL | 25.00 ± 0.00 | 37.50 ± 0.00 | 62.50 ± 0.00 | 700 | 12 |" in lines
    assert "| AT, its start | 0.00 ± 0.00 | 37.50 ± 0.00 | 75.00 ± 0.00 | 700 | 12 |" in lines
    assert "|  | FAAL - AT, its start |" in lines and "Differences [93.75 % interval], p:" in lines
    assert "| worst class, PGD-20 | +25.00 [+25.00, +25.00], 0.062 |" in lines


@given(st.lists(st.floats(-100, 100), min_size=5, max_size=5, unique=True), st.floats(0.01, 10))
def test_sign_flips_refuse_what_lies_outside_the_interval_of_five_and_nothing_else(
    gains: list[float], by: float
) -> None:
    low, high = related.find_interval(gains) or (0.0, 0.0)
    assert (
        flip_signs([gain - (low - by) for gain in gains])
        == flip_signs([gain - (high + by) for gain in gains])
        == 2 / 32
    )
    assert flip_signs([gain - (low + high) / 2 for gain in gains]) > 2 / 32


def test_each_row_is_compared_with_the_controls() -> None:
    rows = dict.fromkeys("abcd", ("", ""))
    assert Comparison(rows, {}).list_pairs() == [("a", "b"), ("a", "c"), ("a", "d")]
    assert Comparison(rows, {}, controls=("d", "c")).list_pairs() == [
        ("a", "d"), ("b", "d"), ("c", "d"), ("a", "c"), ("b", "c"),
    ]  # fmt: skip


def test_what_was_not_run_is_said(runs: Path) -> None:
    assert Study(runs).show("bmtard") == ("Not run yet: BMTARD, robust teacher alone, clean teacher alone.")
    assert (
        "| `faal` | FAAL | 12 | 2026-11-28T00:00 | 2026-11-28T06:00 | abc, torch 2 (12) |" in Study(runs).show_proof()
    )


def test_a_trial_more_beats_a_domain_more_only_where_it_gives_more_runs() -> None:
    six = [(trial, 0) for trial in range(6)]
    assert choose_keys(six) == six
    assert choose_keys([*six, (0, 1)]) == six
    assert choose_keys([*six, *((trial, 1) for trial in range(4))]) == [(t, e) for t in range(4) for e in (0, 1)]
    assert choose_keys([]) == []


def test_the_worst_class_is_one_that_is_there() -> None:
    assert share_worst("right")({"right": [3, 0, 2], "n": [4, 0, 8]}) == 25.0


def test_packed_records_are_read_again(runs: Path, tmp_path: Path) -> None:
    (runs / "faal" / "FAAL-0-0" / "model.pkl").write_text("weights")
    archives = [tmp_path / f"{k}.tar.xz" for k in range(2)]
    for archive in archives:
        assert pack(runs, archive) == 23
    assert archives[0].read_bytes() == archives[1].read_bytes()
    assert Study(runs).show("faal") in related.render(archives[0])
