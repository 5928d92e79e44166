"""The claim study, from its records to docs/results.md and its figures, byte for byte as committed.

python -m tools.claim write          read sweeps/claim/records.tar.xz, write docs/results.md and docs/figures/
python -m tools.claim pack runs/claim    collect the records of finished sweeps, without weights, into that archive
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import math
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from daft_domainbed.errors import RunError
from daft_domainbed.results.comparison import Comparison, collect_trials, compare_trials, correct_family
from daft_domainbed.results.records import Sweep, read_sweep
from daft_domainbed.results.selection import choose
from daft_domainbed.results.statistics import adjust_holm, bootstrap_mean, flip_signs, mean, standard_error
from daft_domainbed.results.tables import Table, build_results
from tools.charts import Axis, Point, Series, draw_chart, make_axis

REPOSITORY = Path(__file__).resolve().parents[1]
STUDY = REPOSITORY / "sweeps" / "claim"
RECORDS = STUDY / "records.tar.xz"
PAGE = REPOSITORY / "docs" / "results.md"
FIGURES = REPOSITORY / "docs" / "figures"
MEASURES = "measures.jsonl"
SELECTION = "training-domain"

MAIN = {
    "erm_w8": "ERM",
    "sma_w8": "ERM, averaged weights",
    "kd_w8": "KD",
    "daft_eps0_w8": "DAFT without adversary",
    "daft_w8": "DAFT",
}
METHODS = {"erm": "ERM", "kd": "KD", "daft": "DAFT"}
WIDTHS = (4, 8, 24)
RADII = {0.0: "daft_eps0_w8", 0.025: "daft_w8"}  # of the adversary, in shares of the features' mean norm


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


class Study:
    """All sweeps of the study, by name.

    Args:
        root: Of the unpacked records: a folder a sweep below `development` and `report`, and `teachers`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.development = {path.name: read_lot(path) for path in sorted((root / "development").iterdir())}
        self.report = {path.name: read_lot(path) for path in sorted((root / "report").iterdir())}
        measures = root / MEASURES
        lines = measures.read_text().splitlines() if measures.is_file() else []
        self.measures: list[dict[str, Any]] = [json.loads(line) for line in lines]

    @cached_property
    def teachers(self) -> list[dict[str, Any]]:
        """The last records of all teachers, which may differ in nothing but a hyperparameter."""
        files = sorted((self.root / "teachers").glob("*/results.jsonl"))
        return [json.loads(file.read_text().splitlines()[-1]) for file in files]

    def compare(self, first: str, second: str) -> Comparison:
        """Compare two sweeps by the trials that both have."""
        ours, theirs = self.report[first], self.report[second]
        return compare_trials(ours.table, first, second, ours.get_trials(), theirs.get_trials())

    def compare_all(self, pairs: Mapping[str, tuple[str, str]]) -> dict[str, Comparison]:
        """Compare pairs of sweeps by the trials that all of them have, so that rows differ in nothing else."""
        lots = {name: self.report[name] for pair in pairs.values() for name in pair}
        accuracies = {name: lot.get_trials() for name, lot in lots.items()}
        shared = set.intersection(*(set(trials) for trials in accuracies.values()))
        kept = {name: {t: trials[t] for t in shared} for name, trials in accuracies.items()}
        return {
            title: compare_trials(lots[first].table, first, second, kept[first], kept[second])
            for title, (first, second) in pairs.items()
        }

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
        return Slope(len(slopes), float(np.mean(slopes)), bootstrap_mean(slopes), flip_signs(slopes))


class Slope(NamedTuple):
    """Points of gain for each doubling of the student's width: mean over trials, interval, sign-flip p-value."""

    n: int
    value: float
    interval: tuple[float, float]
    p: float


def read_lot(path: Path) -> Lot:
    """Read a sweep's records."""
    sweep = read_sweep(path)
    n_files = len([*path.glob("*/results.jsonl")])
    if n_files != len(sweep.runs):
        raise RunError(f"{path.name}: {n_files} runs, of which {len(sweep.runs)} are sound and unlike each other")
    table = next(table for table in build_results(sweep).tables if table.selection == SELECTION)
    return Lot(path.name, sweep, table)


def get_validation(lot: Lot) -> float:
    """Return the mean, in percent, of the accuracies that chose the lot's checkpoints: out-splits it was trained on."""
    runs = [run for run in lot.sweep.runs if len(run.key.test_envs) == 1]
    choices = [choose(SELECTION, [run], run.key.test_envs[0]) for run in runs]
    return 100 * float(np.mean([choice.val_acc for choice in choices if choice]))


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
        rows.append([title, *map(_show_mean, columns), str(len(trials))])
    return make_table(["", *first.table.environments, "average", "trials"], rows)


def show_comparisons(family: Mapping[str, Comparison]) -> str:
    """Return gains with intervals and p-values, the latter corrected for the whole family."""
    rows = []
    for title, entry in zip(family, correct_family([*family.values()]), strict=True):
        assert entry.gain is not None and entry.p is not None and entry.p_adjusted is not None
        n_pairs = entry.n * len(entry.gains)
        numbers = [_show_gain(entry.gain, entry.interval), _show_p(entry.p), _show_p(entry.p_adjusted)]
        rows.append([title, *numbers, str(entry.n), str(n_pairs)])
    return make_table(["", "gain [95 % interval]", "p", "p, Holm", "trials", "pairs"], rows)


def _show_mean(values: Sequence[float]) -> str:
    error = standard_error(values)
    return f"{mean(values):.1f}" + (f" ± {error:.1f}" if error is not None else "")


def _show_gain(gain: float, interval: tuple[float, float] | None) -> str:
    return f"{gain:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


def _show_p(p: float) -> str:
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
        stages.setdefault(f"{record['args']['algorithm']} teachers", []).append(record["seconds"])
    for part, lots in (("development", study.development), ("report", study.report)):
        for lot in lots.values():
            backbone = str(lot.sweep.runs[0].hparams["backbone"]).removeprefix("resnet8_")
            stages.setdefault(f"students {backbone}, {part}", []).extend(run.last["seconds"] for run in lot.sweep.runs)
    rows = [
        [name, str(len(seconds)), f"{np.median(seconds):.1f}", f"{sum(seconds) / 3600:.2f}"]
        for name, seconds in sorted(stages.items())
    ]
    total = [second for seconds in stages.values() for second in seconds]
    rows.append(["**all**", str(len(total)), "", f"**{sum(total) / 3600:.2f}**"])
    return make_table(["stage", "runs", "median seconds", "core hours"], rows)


def show_proof(study: Study) -> str:
    """Return when each report sweep's runs began, and at which commits."""
    rows = []
    for name, lot in study.report.items():
        starts = sorted(str(run.first.get("started")) for run in lot.sweep.runs)
        commits = Counter(str(run.machine.get("commit")) for run in lot.sweep.runs)
        shown = ", ".join(f"{commit} ({count})" for commit, count in sorted(commits.items()))
        rows.append([f"`{name}`", str(len(starts)), starts[0][:16], starts[-1][:16], shown])
    return make_table(["sweep", "runs", "first began", "last began", "commits (runs)"], rows)


# --- figures ------------------------------------------------------------------------------------------------------


def draw_sizes(study: Study, widths: Sequence[int]) -> str:
    """Draw gains against the student's width."""
    x = Axis("width of the student's ResNet-8 (logarithmic)", [(math.log2(width), str(width)) for width in widths])
    series: list[Series] = []
    for name, first, second in (("DAFT - KD", "daft", "kd"), ("KD - ERM", "kd", "erm"), ("DAFT - ERM", "daft", "erm")):
        entries = [study.compare(f"{first}_w{width}", f"{second}_w{width}") for width in widths]
        shift = 0.06 * (len(series) - 1)  # so that intervals do not hide each other
        points = [
            Point(math.log2(width) + shift, entry.gain or 0.0, *(entry.interval or (None, None)))
            for width, entry in zip(widths, entries, strict=True)
        ]
        series.append(Series(name, points))
    ends = [value for line in series for point in line.points for value in (point.y, point.low, point.high)]
    y = make_axis("gain in points", [0.0, *(value for value in ends if value is not None)], 1.0)
    return draw_chart("Gain in held-out accuracy against the student's width", x, y, series)


def draw_teachers(study: Study, lots: Mapping[str, str]) -> str:
    """Draw students against their teachers, a point a held-out domain, mean over trials."""
    series = []
    for name, title in lots.items():
        lot = study.report[name]
        teacher = "AFT" if lot.algorithm == "DAFT" else "ERM"
        rows = {(row.role, row.algorithm): row for row in lot.table.rows}
        pairs = zip(rows["teacher", teacher].cells, rows["student", lot.algorithm].cells, strict=True)
        series.append(Series(title, [Point(t.mean or 0.0, s.mean or 0.0) for t, s in pairs], is_line=False))
    points = [point for line in series for point in line.points]
    x = make_axis("teacher's held-out accuracy, percent", [point.x for point in points], 10.0)
    y = make_axis("student's held-out accuracy, percent", [point.y for point in points], 10.0)
    return draw_chart("Students against their teachers, a point a held-out style", x, y, series)


def draw_radii(study: Study, lots: Mapping[float, str]) -> str:
    """Draw held-out accuracy of teacher and student against the radius of the adversary, by the trials all have."""
    found = [study.report[name] for name in lots.values()]
    trials = sorted(set.intersection(*(set(lot.get_trials()) for lot in found)))
    students, teachers = [], []
    for radius, lot in zip(lots, found, strict=True):
        accuracies = lot.get_trials()
        values = [float(np.mean(accuracies[trial])) for trial in trials]
        students.append(Point(radius, float(np.mean(values)), *bootstrap_mean(values)))
        numbers = [n for row in lot.table.rows if (row.role, row.algorithm) == ("teacher", "AFT") for n in _list(row)]
        by_trial = [
            float(np.mean([n.accuracy for n in numbers if n.choice.run.key.trial_seed == trial])) for trial in trials
        ]
        teachers.append(Point(radius, float(np.mean(by_trial)), *bootstrap_mean(by_trial)))
    series = [Series("AFT teacher", teachers), Series("DAFT student", students)]
    values = [value for line in series for point in line.points for value in (point.low, point.high) if value]
    x = Axis("radius, share of the mean feature norm", [(radius, f"{radius:g}") for radius in lots])
    title = f"Held-out accuracy against the adversary's radius, {len(trials)} trials"
    return draw_chart(title, x, make_axis("held-out accuracy, percent", values, 5.0), series)


def _list(row: Any) -> list[Any]:
    return [number for cell in row.cells for number in cell.numbers]


# --- records ------------------------------------------------------------------------------------------------------


def pack(runs: Path, archive: Path) -> int:
    """Pack records, and what was measured, into an archive whose bytes depend on nothing else; return how many."""
    folders = [file.parent for file in runs.glob("*/**/results.jsonl")]
    unfinished = [folder for folder in folders if not (folder / "done").is_file()]
    if unfinished:
        raise RunError(
            f"{unfinished[0]} is not done, and {len(unfinished) - 1} more are not: go on with its sweep first"
        )
    files = sorted([*runs.glob("*/*/results.jsonl"), *runs.glob("*/*/*/results.jsonl"), *runs.glob(MEASURES)])
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in files:
            member = tarfile.TarInfo(str(file.relative_to(runs)))
            member.size = file.stat().st_size
            tar.addfile(member, io.BytesIO(file.read_bytes()))
    archive.write_bytes(lzma.compress(content.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    return len(files)


def describe(study: Study) -> dict[str, Any]:
    """Return what the page's template takes, beside the functions that show tables."""

    def get_lots(titles: Mapping[str, str]) -> dict[str, Lot]:
        return {title: study.report[name] for name, title in titles.items()}

    cells = [(width, method) for width in WIDTHS for method in METHODS]
    gains = [("daft", "kd"), ("kd", "erm"), ("daft", "erm")]
    pairs = {
        f"{METHODS[a]} - {METHODS[b]}, width {width}": (f"{a}_w{width}", f"{b}_w{width}")
        for a, b in gains
        for width in WIDTHS
    }
    slopes = {f"{METHODS[a]} - {METHODS[b]}": study.fit_slope(a, b, WIDTHS) for a, b in gains}
    planned = {path.stem for path in (STUDY / "report").glob("*.yaml")}
    return {
        "study": study,
        "main": MAIN,
        "widths": WIDTHS,
        "lots": get_lots,
        "sizes": {f"{method}_w{width}": f"{METHODS[method]}, width {width}" for width, method in cells},
        "size_pairs": pairs,
        "slopes": slopes,
        "slope_ps": adjust_holm([slope.p for slope in slopes.values()]),
        "unrun": sorted(planned - study.report.keys()),
        "development": {name: name.split("_")[0].upper() for name in study.development},
        "cpu": study.report["erm_w8"].sweep.runs[0].machine["cpu"],
        "gain": _show_gain,
        "p": _show_p,
    }


def write(archive: Path, page: Path, figures: Path) -> None:
    """Write the page and the figures from the records."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        study = Study(Path(folder))
        loader = jinja2.FileSystemLoader(STUDY)
        environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        tools: dict[str, Callable[..., Any]] = {
            name: value for name, value in globals().items() if name.startswith(("show_", "get_"))
        }
        text = environment.get_template("results.md.j2").render(tools | describe(study))
        figures.mkdir(exist_ok=True)
        drawings = {
            "sizes.svg": draw_sizes(study, WIDTHS),
            "teachers.svg": draw_teachers(study, {"kd_w8": "KD", "daft_w8": "DAFT"}),
            "radii.svg": draw_radii(study, RADII),
        }
    page.write_text(text)
    for name, drawing in drawings.items():
        (figures / name).write_text(drawing)


def main(argv: Sequence[str] | None = None) -> int:
    """Pack, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write")
    commands.add_parser("pack").add_argument("runs", type=Path)
    args = parser.parse_args(argv)
    if args.command == "pack":
        print(f"{RECORDS}: {pack(args.runs, RECORDS)} files")
    else:
        write(RECORDS, PAGE, FIGURES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
