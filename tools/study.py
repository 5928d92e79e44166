"""Sweeps of a study by name, their trials compared, and the tables of its page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from daft_domainbed.errors import RunError
from daft_domainbed.results.cells import Table
from daft_domainbed.results.comparison import FEWEST_TRIALS, Comparison, collect_trials, compare_trials, correct_family
from daft_domainbed.results.selection import choose
from daft_domainbed.results.statistics import bootstrap_mean, flip_signs, mean, standard_error
from daft_domainbed.results.sweeps import Sweep, read_sweep
from daft_domainbed.results.tables import build_results
from daft_domainbed.runtime.layout import RECORDS_FILE, TEACHERS_FOLDER, read_last_record
from tools.power import find_smallest_effect, find_smallest_margin

MEASURES = "measures.jsonl"
SELECTION = "training-domain"


class Lot(NamedTuple):
    """One sweep of the study: a single algorithm on a single data set."""

    name: str
    sweep: Sweep
    table: Table

    @property
    def algorithm(self) -> str:
        """Its only one."""
        return next(row.algorithm for row in self.table.rows if row.role == "student")

    def get_trials(self) -> dict[int, list[float]]:
        """Return the accuracies, in percent, on each held-out domain, by trial."""
        return collect_trials(self.table, self.algorithm)


Collect = Callable[[Lot], dict[int, list[float]]]  # accuracies on each held-out domain, by trial


class Study:
    """All sweeps of the study, by name.

    Args:
        root: Of the unpacked records: a folder a sweep below `development` and `report`, and `teachers`.
        weights: Whose accuracies are the students': the "plain" weights', or the "averaged" ones'.
    """

    def __init__(self, root: Path, weights: str = "plain") -> None:
        self.development = {path.name: read_lot(path, weights) for path in sorted((root / "development").iterdir())}
        self.report = {path.name: read_lot(path, weights) for path in sorted((root / "report").iterdir())}
        measures = root / MEASURES
        lines = measures.read_text().splitlines() if measures.is_file() else []
        self.measures: list[dict[str, Any]] = [json.loads(line) for line in lines]
        # The last records of all teachers, which may differ in nothing but a hyperparameter.
        self.teachers = [read_last_record(folder) for folder in sorted((root / TEACHERS_FOLDER).glob("*"))]

    def compare(self, first: str, second: str, collect: Collect = Lot.get_trials) -> Comparison:
        """Compare two sweeps by the trials that both have; see `compare_all`."""
        return self.compare_all({"": (first, second)}, collect)[""]

    def compare_all(
        self, pairs: Mapping[str, tuple[str, str]], collect: Collect = Lot.get_trials, first_trial: int = 0
    ) -> dict[str, Comparison]:
        """Compare pairs of sweeps by the trials that all of them have, so that rows differ in nothing else.

        Args:
            pairs: Of sweeps, by what their row is called.
            collect: Whose accuracies of a sweep, the students' or their teachers'.
            first_trial: Those before are left out.
        """
        lots = {name: self.report[name] for pair in pairs.values() for name in pair}
        accuracies = {name: collect(lot) for name, lot in lots.items()}
        shared = set.intersection(*(set(trials) for trials in accuracies.values()))
        kept = {name: {t: trials[t] for t in shared if t >= first_trial} for name, trials in accuracies.items()}
        return {
            title: compare_trials(lots[first].table, first, second, kept[first], kept[second])
            for title, (first, second) in pairs.items()
        }

    def list_gains(self, first: str, second: str) -> list[float]:
        """Return the gain of one sweep over another in each trial that both have."""
        ours, theirs = (self.report[name].get_trials() for name in (first, second))
        return [float(np.mean(np.subtract(ours[t], theirs[t]))) for t in sorted(ours.keys() & theirs.keys())]

    def fit_slope(self, first: str, second: str, widths: Sequence[int]) -> Slope:
        """Fit each trial's gain of one method over another as a line in log2 of the student's width.

        Args:
            first: Name of the method's sweeps, without the width.
            second: The other's.
            widths: At least two.
        """
        by_width = []
        for width in widths:
            ours, theirs = (self.report[f"{name}_w{width}"].get_trials() for name in (first, second))
            by_width.append({t: float(np.mean(np.subtract(ours[t], theirs[t]))) for t in ours.keys() & theirs.keys()})
        trials = sorted(set.intersection(*(set(gains) for gains in by_width)))
        x = np.log2(widths) - np.log2(widths).mean()
        slopes = [float(x @ [gains[trial] for gains in by_width] / (x @ x)) for trial in trials]
        interval = bootstrap_mean(slopes) if len(slopes) >= FEWEST_TRIALS else None
        return Slope(len(slopes), float(np.mean(slopes)), interval, flip_signs(slopes))


class Slope(NamedTuple):
    """Points of gain for each doubling of the student's width: mean over trials, interval, sign-flip p-value."""

    n: int
    value: float
    interval: tuple[float, float] | None
    p: float


def read_lot(path: Path, weights: str = "plain") -> Lot:
    """Read a sweep's records; the students' accuracies are their "plain" or their "averaged" weights'."""
    sweep = read_sweep(path, weights)
    n_files = len([*path.glob(f"*/{RECORDS_FILE}")])
    if n_files != len(sweep.runs):
        raise RunError(f"{path.name}: {n_files} runs, of which {len(sweep.runs)} are sound and unlike each other")
    table = next(table for table in build_results(sweep).tables if table.selection == SELECTION)
    return Lot(path.name, sweep, table)


def get_validation(lot: Lot) -> float:
    """Return the mean, in percent, of the accuracies that chose the lot's checkpoints: out-splits it was trained on."""
    runs = [run for run in lot.sweep.runs if len(run.key.test_envs) == 1]
    choices = [choose(SELECTION, [run], run.key.test_envs[0]) for run in runs]
    return 100 * float(np.mean([choice.val_acc for choice in choices if choice]))


def get_teachers(lot: Lot) -> dict[int, list[float]]:
    """Return the accuracies, in percent, of a lot's teachers on each held-out domain, by trial."""
    accuracies: dict[int, dict[int, float]] = {}
    for run in lot.sweep.runs:
        (env,) = run.key.test_envs
        recorded = run.first["teacher"]["accuracies"][f"env{env}_in_acc"]
        accuracies.setdefault(run.key.trial_seed, {})[env] = 100 * recorded
    return {trial: [by_env[env] for env in sorted(by_env)] for trial, by_env in sorted(accuracies.items())}


# --- tables -------------------------------------------------------------------------------------------------------


def make_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def show_accuracies(lots: Mapping[str, Lot]) -> str:
    """Return accuracies by held-out domain, mean and standard error over trials."""
    first = next(iter(lots.values()))
    rows = []
    for title, lot in lots.items():
        trials = np.array([*lot.get_trials().values()])
        columns = [*trials.T.tolist(), trials.mean(axis=1).tolist()]
        rows.append([title, *map(show_mean, columns), str(len(trials))])
    return make_table(["", *first.table.environments, "average", "trials"], rows)


def show_comparisons(family: Mapping[str, Comparison]) -> str:
    """Return gains with intervals and p-values, the latter corrected for the whole family."""
    rows = []
    for title, entry in zip(family, correct_family([*family.values()]), strict=True):
        assert entry.gain is not None and entry.p is not None and entry.p_adjusted is not None
        n_pairs = entry.n * len(entry.gains)
        numbers = [show_gain(entry.gain, entry.interval), show_p(entry.p), show_p(entry.p_adjusted)]
        rows.append([title, *numbers, str(entry.n), str(n_pairs)])
    return make_table(["", "gain [95 % interval]", "p", "p, Holm", "trials", "pairs"], rows)


def show_equivalence(study: Study, pairs: Mapping[str, tuple[str, str]], margin: float) -> str:
    """Return 90 % intervals with what they say of a margin: two one-sided tests at 5 % (Schuirmann, 1987).

    Args:
        study: Has the sweeps.
        pairs: Of sweeps, by what their row is called.
        margin: In points.
    """
    rows = []
    for title, (first, second) in pairs.items():
        gains = study.list_gains(first, second)
        low, high = bootstrap_mean(gains, 0.9)
        is_within, is_found = -margin < low and high < margin, flip_signs(gains) < 0.05
        verdict = {
            (True, True): "different, by less than the margin",
            (True, False): "equivalent",
            (False, True): "different",
            (False, False): "not resolved",
        }[is_within, is_found]
        verdict = verdict if len(gains) >= FEWEST_TRIALS else "too few trials"
        rows.append([title, f"[{low:+.2f}, {high:+.2f}]", verdict, str(len(gains))])
    return make_table(["", "90 % interval", "says", "trials"], rows)


def show_mean(values: Sequence[float]) -> str:
    """Return a mean over trials with its standard error."""
    error = standard_error(values)
    return f"{mean(values):.1f}" + (f" ± {error:.1f}" if error is not None else "")


def show_gain(gain: float, interval: tuple[float, float] | None) -> str:
    """Return a gain in points with its interval."""
    return f"{gain:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


def show_p(p: float) -> str:
    """Return a p-value."""
    return f"{p:.4f}" if p >= 0.00005 else f"{p:.0e}"


def show_development(study: Study, titles: Mapping[str, str]) -> str:
    """Return the validation accuracies that chose the hyperparameters, the chosen one of each method in bold."""
    rows = []
    for method in dict.fromkeys(titles.values()):
        lots = {name: get_validation(study.development[name]) for name in titles if titles[name] == method}
        best = max(lots, key=lambda name: lots[name])
        for name, value in lots.items():
            shown = f"**{value:.2f}**" if name == best else f"{value:.2f}"
            rows.append([method, f"`{name}`", shown, str(len(study.development[name].get_trials()))])
    return make_table(["method", "sweep", "validation accuracy", "trials"], rows)


def show_measures(study: Study, lots: Mapping[str, str]) -> str:
    """Return what was measured beside accuracy, on the held-out domain, means over runs."""
    rows = []
    for name, title in lots.items():
        found = [line for line in study.measures if line["sweep"] == name]
        for role in ("student", "teacher"):
            if not (lines := [line[role] for line in found if line.get(role)]):
                continue
            values = {key: [line[key] for line in lines if line.get(key) is not None] for key in _MEASURED}
            cells = [f"{100 * np.mean(numbers):.1f}" if numbers else "" for numbers in values.values()]
            counts = [len(values["held_out"]), len(values["robust_small"])]
            rows.append([f"{title}, {role}" if role == "teacher" else title, *cells, f"{counts[0]}, {counts[1]}"])
    return make_table(["", *_MEASURED.values(), "runs, of which attacked"], rows)


_MEASURED = {
    "trained": "training domains",
    "held_out": "held-out domain",
    "agreement": "agrees with its teacher",
    "calibration_error": "calibration error",
    "robust_small": "under PGD 1/255",
    "robust_large": "under PGD 2/255",
}


def show_costs(study: Study) -> str:
    """Return core hours by stage, and seconds a run."""
    stages: dict[str, list[float]] = {}
    for record in study.teachers:
        hparams = record["hparams"]
        name = hparams["backbone"].removeprefix("timm/tf_")
        stages.setdefault(f"{record['args']['algorithm']} teachers, {name}", []).append(record["seconds"])
    for part, lots in (("development", study.development), ("report", study.report)):
        for lot in lots.values():
            first = lot.sweep.runs[0]
            backbone = str(first.hparams["backbone"]).removeprefix("resnet8_")
            name = f"students {backbone}, {part}, {first.machine['precision']}"
            stages.setdefault(name, []).extend(run.last["seconds"] for run in lot.sweep.runs)
    rows = [
        [name, str(len(seconds)), f"{np.median(seconds):.1f}", f"{sum(seconds) / 3600:.2f}"]
        for name, seconds in sorted(stages.items())
    ]
    total = [second for seconds in stages.values() for second in seconds]
    rows.append(["**all**", str(len(total)), "", f"**{sum(total) / 3600:.2f}**"])
    return make_table(["stage", "runs", "median seconds", "core hours"], rows)


def show_power() -> str:
    """Return what numbers of trials can show at several spreads of a trial's difference."""
    rows = [
        [f"{spread:g}", str(n), f"{find_smallest_effect(spread, n):.1f}", f"{find_smallest_margin(spread, n):.1f}"]
        for spread in (1.0, 2.0, 3.0)
        for n in (24, 12, 8)
    ]
    header = ["spread of a trial's difference", "trials", "smallest effect found (p < 0.05)", "smallest margin shown"]
    return make_table(header, rows)


def show_proof(study: Study) -> str:
    """Return when each report sweep's runs began, and at which commits."""
    rows = []
    for name, lot in study.report.items():
        starts = sorted(str(run.first.get("started")) for run in lot.sweep.runs)
        commits = Counter(str(run.machine.get("commit")) for run in lot.sweep.runs)
        shown = ", ".join(f"{commit} ({count})" for commit, count in sorted(commits.items()))
        rows.append([f"`{name}`", str(len(starts)), starts[0][:16], starts[-1][:16], shown])
    return make_table(["sweep", "runs", "first began", "last began", "commits (runs)"], rows)
