"""Typesetting: each gap has one footnote, and only students are marked as best."""

from __future__ import annotations

import shutil

from daft_domainbed.results.sweeps import read_sweep
from daft_domainbed.results.tables import build_results
from daft_domainbed.results.typesetting import lay_out
from tests.results.conftest import find_job


def test_cells_with_one_gap_share_a_footnote(full_sweep):
    for algorithm, env in (("KD", 0), ("DAFT", 0), ("DAFT", 2)):
        shutil.rmtree(full_sweep.root / find_job(full_sweep, algorithm, env, 1)["folder"])
    layout = lay_out(build_results(read_sweep(full_sweep.root)).tables[0])
    assert layout.footnotes == [
        "KD on red (n = 1); DAFT on red (n = 1), blue (n = 1): not launched (trial 1, hparams_seed 0).",
        "ERM teacher on red (n = 1); AFT teacher on red (n = 1), blue (n = 1): no student of it is done (trial 1).",
    ]
    footnotes = {line.row.label: [entry.footnote for entry in line.entries] for line in layout.lines}
    assert footnotes["KD"] == ["1", "", "", ""]
    assert footnotes["AFT teacher"] == ["2", "", "2", ""]


def test_the_best_student_of_each_column_is_marked(full_sweep):
    layout = lay_out(build_results(read_sweep(full_sweep.root)).tables[0])
    assert {line.row.label for line in layout.lines if any(entry.is_best for entry in line.entries)} == {"DAFT"}
    assert [entry.value for entry in layout.lines[2].entries] == ["65.5", "66.5", "67.5", "66.5"]
