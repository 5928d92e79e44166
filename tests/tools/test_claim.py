"""The claim study: its page is what its records say, and each of its numbers can be worked out by hand."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import copytree

import pytest

from daft_domainbed.errors import RunError
from tests.results.conftest import SweepMaker
from tools import claim
from tools import study as tables
from tools.study import Study

Gains = Mapping[int, float]  # by trial
ENVIRONMENTS = ("red", "green")


def write_lot(root: Path, name: str, algorithm: str, accuracies: Gains, validation: float = 0.5) -> None:
    """Write a sweep: a trial's accuracy is the percentage given on red, and 10 points more on green."""
    sweep = SweepMaker(root / name, ENVIRONMENTS)
    for trial, percent in accuracies.items():
        for env in range(len(ENVIRONMENTS)):
            late = [(0.9, validation)] * len(ENVIRONMENTS)
            late[env] = ((percent + 10 * env) / 100, 0.0)
            first = {"environments": ENVIRONMENTS, "started": f"2026-11-24T0{trial % 10}:00:00+00:00"}
            first |= {"machine": {"commit": "abc1234", "precision": "bf16"}}
            first |= {"teacher": {"accuracies": {f"env{env}_in_acc": (percent + 20) / 100}}}
            hparams = {"backbone": "resnet8_w8"}
            checkpoints = {0: [(0.1, 0.1)] * len(ENVIRONMENTS), 10: late}
            last = {"seconds": 36.0}
            sweep.run(algorithm, [env], checkpoints, first=first, last=last, hparams=hparams, trial_seed=trial)


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Study]:
    """Makes a study of report sweeps, from the accuracies of their trials."""

    def make(**lots: Gains) -> Study:
        (tmp_path / "development").mkdir()
        for name, accuracies in lots.items():
            write_lot(tmp_path / "report", name, name.split("_")[0].upper(), accuracies)
        return Study(tmp_path)

    return make


def test_every_sweep_of_the_study_was_planned(tmp_path: Path) -> None:
    with tarfile.open(claim.RECORDS) as tar:
        tar.extractall(tmp_path, filter="data")
    for part in ("development", "report"):
        planned = {path.stem for path in (claim.STUDY / part).glob("*.yaml")}
        run = {path.name for path in (tmp_path / part).iterdir()}
        assert run and run <= planned


def test_page_and_figures_are_what_the_records_say(tmp_path: Path) -> None:
    claim.write(claim.RECORDS, tmp_path / "results.md", tmp_path / "figures")
    assert (tmp_path / "results.md").read_text() == claim.PAGE.read_text()
    made = {path.name: path.read_text() for path in (tmp_path / "figures").iterdir()}
    assert made == {path.name: path.read_text() for path in claim.FIGURES.iterdir()}


def test_trials_of_two_sweeps_are_paired(make_study: Callable[..., Study]) -> None:
    study = make_study(kd_w8={0: 40, 1: 42, 2: 41, 7: 0}, daft_w8={2: 44, 1: 43, 0: 42, 8: 99})
    entry = study.compare("daft_w8", "kd_w8")
    assert (entry.n, entry.gains) == (3, pytest.approx({"red": 2.0, "green": 2.0}))
    assert entry.gain == pytest.approx(2.0)  # 2, 1 and 3
    assert entry.p == 2 / 8


def test_slope_by_hand(make_study: Callable[..., Study]) -> None:
    # Gains of 4, 2 and 0 at widths 4, 8 and 16: two points less for each doubling; the trial's own shift is no slope.
    kd = {trial: 40.0 + trial for trial in range(6)}
    lots = {f"kd_w{width}": kd for width in (4, 8, 16)}
    lots |= {f"daft_w{w}": {t: a + gain + t for t, a in kd.items()} for w, gain in ((4, 4), (8, 2), (16, 0))}
    slope = make_study(**lots).fit_slope("daft", "kd", [4, 8, 16])
    assert slope.n == 6
    assert slope.value == pytest.approx(-2.0)
    assert slope.interval == pytest.approx((-2.0, -2.0))
    assert slope.p == 2 / 2**6


def test_slope_counts_trials_that_every_width_has(make_study: Callable[..., Study]) -> None:
    study = make_study(kd_w4={0: 1, 1: 1}, daft_w4={0: 2, 1: 9}, kd_w8={0: 1, 2: 1}, daft_w8={0: 4, 2: 9})
    slope = study.fit_slope("daft", "kd", [4, 8])
    assert (slope.n, slope.value, slope.interval) == (1, pytest.approx(2.0), None)


def test_rows_of_a_table_share_their_trials(make_study: Callable[..., Study]) -> None:
    study = make_study(kd_w8={0: 40, 1: 40, 2: 40}, daft_w8={0: 41, 1: 43, 2: 49}, erm_w8={0: 30, 1: 30})
    family = study.compare_all({"a": ("daft_w8", "kd_w8"), "b": ("daft_w8", "erm_w8")})
    assert [(entry.n, entry.gain) for entry in family.values()] == [(2, pytest.approx(2)), (2, pytest.approx(12))]
    assert tables.show_comparisons(family).splitlines()[2] == "| a | +2.00 | 0.5000 | 1.0000 | 2 | 4 |"


def test_teachers_are_those_that_students_recorded(make_study: Callable[..., Study]) -> None:
    study = make_study(kd_w8={0: 40, 3: 41})
    assert tables.get_teachers(study.report["kd_w8"]) == {0: pytest.approx([60, 60]), 3: pytest.approx([61, 61])}


def test_size_figure_shows_the_gains_of_its_table(make_study: Callable[..., Study]) -> None:
    trials = range(2)
    lots = {f"{name}_w{w}": dict.fromkeys(trials, 40.0 + i) for w in (4, 8) for i, name in enumerate(claim.METHODS)}
    pairs = claim.list_size_pairs([4, 8])
    assert [*pairs.items()][:2] == [
        ("DAFT - KD, width 4", ("daft_w4", "kd_w4")),
        ("DAFT - KD, width 8", ("daft_w8", "kd_w8")),
    ]
    drawn = claim.draw_sizes(make_study(**lots), [4, 8])
    assert [drawn.count(f">{name}</text>") for name in ("DAFT - KD", "KD - ERM", "DAFT - ERM")] == [1, 1, 1]
    assert drawn.count("<circle") == 6


def test_a_run_that_exists_twice_is_refused(make_study: Callable[..., Study], tmp_path: Path) -> None:
    make_study(erm_w8={0: 1, 1: 1})
    folder = next((tmp_path / "report" / "erm_w8").glob("*/results.jsonl")).parent
    copytree(folder, folder.with_name("again"))
    with pytest.raises(RunError, match="erm_w8: 5 runs, of which 4 are sound and unlike each other"):
        Study(tmp_path)


def test_unfinished_runs_are_not_packed(make_study: Callable[..., Study], tmp_path: Path) -> None:
    make_study(erm_w8={0: 1, 1: 1})
    for done in sorted(tmp_path.rglob("done"))[:2]:
        done.unlink()
    with pytest.raises(RunError, match="is not done, and 1 more are not: go on with its sweep first"):
        claim.pack(tmp_path, tmp_path / "first.tar.xz")
    assert not (tmp_path / "first.tar.xz").exists()


def test_comparison_table_corrects_for_its_family(make_study: Callable[..., Study]) -> None:
    ours = dict.fromkeys(range(6), 40.0)
    study = make_study(daft_w8=ours, kd_w8=dict.fromkeys(ours, 39.0), erm_w8={t: 38.0 + (t == 0) * 5 for t in ours})
    family = {name: study.compare("daft_w8", f"{name}_w8") for name in ("kd", "erm")}
    *_, kd, erm = tables.show_comparisons(family).splitlines()
    assert kd == "| kd | +1.00 [+1.00, +1.00] | 0.0312 | 0.0625 | 6 | 12 |"
    assert erm.startswith("| erm | +1.17 [-0.50, +2.00] |")


def test_development_is_judged_by_training_domains(tmp_path: Path) -> None:
    for name, validation in (("kd_a", 0.5), ("kd_b", 0.6), ("erm_a", 0.3)):
        write_lot(tmp_path / "development", name, "KD", {100: 90 if name == "kd_a" else 10}, validation)
    (tmp_path / "report").mkdir()
    shown = tables.show_development(Study(tmp_path), {"kd_a": "KD", "kd_b": "KD", "erm_a": "ERM"})
    assert "| KD | `kd_a` | 50.00 | 1 |\n| KD | `kd_b` | **60.00** | 1 |\n| ERM | `erm_a` | **30.00** | 1 |" in shown


def test_proof_names_runs_times_and_commits(make_study: Callable[..., Study]) -> None:
    study = make_study(erm_w8={0: 1, 3: 1})
    row = tables.show_proof(study).splitlines()[-1]
    assert row == "| `erm_w8` | 4 | 2026-11-24T00:00 | 2026-11-24T03:00 | abc1234 (4) |"


def test_costs_are_added_up(make_study: Callable[..., Study], tmp_path: Path) -> None:
    write_lot(tmp_path, "teachers", "AFT", {0: 50})  # two held-out domains
    other = next((tmp_path / "teachers").iterdir())
    copytree(other, other.with_name("another radius"))
    study = make_study(erm_w8={0: 1, 1: 1, 2: 1})
    rows = tables.show_costs(study).splitlines()[2:]
    assert rows[0] == "| AFT teachers, resnet8_w8 | 3 | 36.0 | 0.03 |"
    assert rows[1] == "| students w8, report, bf16 | 6 | 36.0 | 0.06 |"
    assert rows[2] == "| **all** | 9 |  | **0.09** |"


def test_archive_holds_records_and_depends_on_nothing_else(make_study: Callable[..., Study], tmp_path: Path) -> None:
    make_study(erm_w8={0: 1, 1: 1}, kd_w8={0: 1})
    (tmp_path / "report" / "erm_w8" / "model.pkl").write_text("weights")
    assert claim.pack(tmp_path, tmp_path / "first.tar.xz") == 6
    for path in tmp_path.rglob("results.jsonl"):
        os.utime(path, (1, 1))
    claim.pack(tmp_path, tmp_path / "second.tar.xz")
    assert (tmp_path / "first.tar.xz").read_bytes() == (tmp_path / "second.tar.xz").read_bytes()
    with tarfile.open(tmp_path / "first.tar.xz") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert {path.name for path in (tmp_path / "unpacked").rglob("*") if path.is_file()} == {"results.jsonl"}
    names = {path.relative_to(tmp_path / "unpacked") for path in (tmp_path / "unpacked").rglob("results.jsonl")}
    assert names == {path.relative_to(tmp_path) for path in (tmp_path / "report").rglob("results.jsonl")}
