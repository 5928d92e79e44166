"""The command: tables to standard output, notes to standard error."""

from __future__ import annotations

import json

import pytest

from daft_domainbed.errors import UsageError
from daft_domainbed.results.formats import FORMATS
from daft_domainbed.scripts.collect_results import build_parser, main


def test_it_prints_tables_and_notes_apart(full_sweep, capsys):
    (full_sweep.root / "stray").mkdir()
    assert main(["--input_dir", str(full_sweep.root)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Toy: training-domain validation\n")
    assert captured.err == "stray: not a run: no results.jsonl; left out\n"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_offered(full_sweep, capsys, name):
    assert main(["--input_dir", str(full_sweep.root), "--format", name]) == 0
    out = capsys.readouterr().out
    assert "DAFT" in out
    if name == "json":
        assert json.loads(out)["schema"] == 1


def test_the_parser_offers_the_formats_there_are():
    (action,) = [action for action in build_parser()._actions if action.dest == "format"]
    assert list(action.choices) == list(FORMATS)


def test_a_folder_without_runs_is_bad_usage(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        main(["--input_dir", str(tmp_path)])
