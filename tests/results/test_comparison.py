"""Comparisons by hand: gains are paired by trial, and a trial counts only where both have every held-out domain."""

from __future__ import annotations

import json
import shutil

import pytest

from daft_domainbed.cli import run_command
from daft_domainbed.errors import UsageError
from daft_domainbed.results.comparison import compare
from daft_domainbed.results.comparison_formats import format_comparisons
from daft_domainbed.results.sweeps import read_sweep
from daft_domainbed.results.tables import build_results
from tests.results.conftest import SweepMaker, fill_full_sweep


@pytest.fixture
def three_trials(sweep: SweepMaker) -> SweepMaker:
    """In each trial and domain DAFT has 5 points more than ERM and 3 more than KD."""
    fill_full_sweep(sweep, trials=3)
    return sweep


def test_by_hand(three_trials):
    kd, erm = compare(build_results(read_sweep(three_trials.root)), "DAFT", ["KD", "ERM"])
    assert (kd.first, kd.second, kd.n) == ("DAFT", "KD", 3)
    assert kd.gain == pytest.approx(3.0)
    assert kd.interval is None
    assert kd.p == 2 / 8  # of the 8 sign patterns, the observed one and its mirror
    assert kd.gains == pytest.approx({"red": 3.0, "green": 3.0, "blue": 3.0})
    assert erm.gain == pytest.approx(5.0)
    assert erm.p_adjusted == kd.p_adjusted == 0.5  # two comparisons


def test_six_trials_have_an_interval(sweep):
    fill_full_sweep(sweep, trials=6)
    (entry,) = compare(build_results(read_sweep(sweep.root)), "DAFT", ["KD"])
    assert entry.interval == pytest.approx((3.0, 3.0))
    assert entry.p == 2 / 64
    assert "+3.0 [+3.0, +3.0], p 0.031, n = 6 trials (" in format_comparisons([entry])


def test_a_trial_that_lacks_a_domain_is_left_out(three_trials):
    jobs = [job for job in three_trials.jobs if job["args"]["algorithm"] == "KD" and job["args"]["trial_seed"] == 1]
    shutil.rmtree(three_trials.root / jobs[0]["folder"])
    (entry,) = compare(build_results(read_sweep(three_trials.root)), "DAFT", ["KD"])
    assert (entry.n, entry.p) == (2, 0.5)


def test_one_trial_has_a_gain_and_nothing_else(sweep):
    fill_full_sweep(sweep, trials=1)
    (entry,) = compare(build_results(read_sweep(sweep.root)), "DAFT", ["ERM"])
    assert entry.gain == pytest.approx(5.0)
    assert (entry.n, entry.interval, entry.p, entry.p_adjusted) == (1, None, None, None)
    assert "+5.0, one trial, which says nothing of its spread" in format_comparisons([entry])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("DATF", ["KD"]), "DATF: no students of it here. Did you mean 'DAFT'"),
        (("DAFT", ["AFT"]), "AFT: no students of it here"),
        (("DAFT", ["KD", "KD"]), "named twice"),
    ],
)
def test_what_cannot_be_compared_is_refused(three_trials, names, message):
    with pytest.raises(UsageError, match=message):
        compare(build_results(read_sweep(three_trials.root)), *names)


def test_command(three_trials, capsys):
    flags = ["--input_dir", str(three_trials.root), "--compare", "DAFT", "KD"]
    assert run_command("collect_results", flags) == 0
    assert (
        "  DAFT - KD: +3.0, p 0.250, n = 3 trials, too few for an interval (6 or more) (red +3.0"
        in capsys.readouterr().out
    )
    assert run_command("collect_results", [*flags, "--format", "json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["first"], entry["second"], entry["n"], entry["p"]) == ("DAFT", "KD", 3, 0.25)
    assert run_command("collect_results", [*flags[:-1]]) == 2
