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
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from daft_domainbed.errors import RunError
from daft_domainbed.results.comparison import FEWEST_TRIALS, Comparison, collect_trials, compare_trials, correct_family
from daft_domainbed.results.selection import choose
from daft_domainbed.results.statistics import adjust_holm, bootstrap_mean, flip_signs, mean, standard_error
from daft_domainbed.results.sweeps import Sweep, read_sweep
from daft_domainbed.results.tables import Table, build_results
from daft_domainbed.runtime.layout import DONE_FILE, RECORDS_FILE, TEACHERS_FOLDER, read_last_record
from tools.charts import Axis, Point, Series, draw_chart, make_axis
from tools.power import find_smallest_effect, find_smallest_margin
from tools.proof import check_records

REPOSITORY = Path(__file__).resolve().parents[1]
STUDY = REPOSITORY / "sweeps" / "claim"
RECORDS = STUDY / "records.tar.xz"
PRETRAINED = STUDY / "pretrained"
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
SCRATCH = {
    "erm_scratch": "ERM",
    "kd_scratch": "KD",
    "daft_pixels_eps0_scratch": "DAFT without adversary",
    "daft_pixels_scratch": "DAFT, pixels",
    "daft_all_scratch": "DAFT, whole network, pixels",
}
DIGITS = {
    "erm_digits": "ERM",
    "kd_digits": "KD",
    "daft_eps0_digits": "DAFT without adversary",
    "daft_digits": "DAFT, pixels",
}
METHODS = {"erm": "ERM", "kd": "KD", "daft": "DAFT"}
GAINS = (("daft", "kd"), ("kd", "erm"), ("daft", "erm"))
WIDTHS = (4, 8, 24)
# Radius of the adversary, in shares of the features' mean norm, by development sweep that is alike but for it.
# At 0 stands KD with the same settings: it distils the teacher that the others fine-tune.
RADII = {
    0.0: "kd_t4_w0.7",
    0.025: "daft_eps0.025_mix0.5",
    0.05: "daft_eps0.05_mix0.5",
    0.1: "daft_eps0.1_mix0.5",
}


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
    """

    def __init__(self, root: Path) -> None:
        self.development = {path.name: read_lot(path) for path in sorted((root / "development").iterdir())}
        self.report = {path.name: read_lot(path) for path in sorted((root / "report").iterdir())}
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


def read_lot(path: Path) -> Lot:
    """Read a sweep's records."""
    sweep = read_sweep(path)
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


# --- figures ------------------------------------------------------------------------------------------------------


def draw_sizes(study: Study, widths: Sequence[int]) -> str:
    """Draw gains against the student's width, those of the size table."""
    x = Axis("width of the student's ResNet-8 (logarithmic)", [(math.log2(width), str(width)) for width in widths])
    entries = study.compare_all(list_size_pairs(widths))
    series: list[Series] = []
    for a, b in GAINS:
        name = f"{METHODS[a]} - {METHODS[b]}"
        shift = 0.06 * (len(series) - 1)  # so that intervals do not hide each other
        points = []
        for width in widths:
            entry = entries[f"{name}, width {width}"]
            assert entry.gain is not None
            points.append(Point(math.log2(width) + shift, entry.gain, *(entry.interval or (None, None))))
        series.append(Series(name, points))
    ends = [value for line in series for point in line.points for value in (point.y, point.low, point.high)]
    y = make_axis("gain in points", [0.0, *(value for value in ends if value is not None)], 1.0)
    return draw_chart("Gain in held-out accuracy against the student's width", x, y, series)


def draw_teachers(study: Study, lots: Mapping[str, str]) -> str:
    """Draw students against their teachers, a point a held-out domain, mean over trials."""
    series = []
    for name, title in lots.items():
        lot = study.report[name]
        taught = np.mean([*get_teachers(lot).values()], axis=0)
        students = np.mean([*lot.get_trials().values()], axis=0)
        series.append(Series(title, [Point(*pair) for pair in zip(taught, students, strict=True)], is_line=False))
    points = [point for line in series for point in line.points]
    x = make_axis("teacher's held-out accuracy, percent", [point.x for point in points], 10.0)
    y = make_axis("student's held-out accuracy, percent", [point.y for point in points], 10.0)
    return draw_chart("Students against their teachers, a point a held-out style", x, y, series)


def draw_radii(study: Study, lots: Mapping[float, str]) -> str:
    """Draw held-out accuracy of teacher and student against the radius of the adversary, on development trials.

    Args:
        study: All sweeps.
        lots: Development sweeps by radius.
    """
    students: list[Point] = []
    teachers: list[Point] = []
    for radius, name in lots.items():
        lot = study.development[name]
        for points, accuracies in ((students, lot.get_trials()), (teachers, get_teachers(lot))):
            points.append(Point(radius, float(np.mean([*accuracies.values()]))))
    series = [Series("teacher", teachers), Series("student", students)]
    x = Axis("radius, share of the mean feature norm", [(radius, f"{radius:g}" if radius else "KD") for radius in lots])
    y = make_axis("held-out accuracy, percent", [point.y for line in series for point in line.points], 5.0)
    return draw_chart("Held-out accuracy against the adversary's radius, development trials", x, y, series)


# --- records ------------------------------------------------------------------------------------------------------


def pack(runs: Path, archive: Path) -> int:
    """Pack records, and what was measured, into an archive whose bytes depend on nothing else; return how many."""
    records = [*runs.glob(f"*/**/{RECORDS_FILE}")]
    unfinished = [file.parent for file in records if not (file.parent / DONE_FILE).is_file()]
    if unfinished:
        raise RunError(
            f"{unfinished[0]} is not done, and {len(unfinished) - 1} more are not: go on with its sweep first"
        )
    files = sorted([*records, *runs.glob(MEASURES)])
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in files:
            member = tarfile.TarInfo(str(file.relative_to(runs)))
            member.size = file.stat().st_size
            tar.addfile(member, io.BytesIO(file.read_bytes()))
    archive.write_bytes(lzma.compress(content.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    return len(files)


def list_size_pairs(widths: Sequence[int]) -> dict[str, tuple[str, str]]:
    """Return what the size of the student is judged by: all gains of methods, each at every width."""
    return {
        f"{METHODS[a]} - {METHODS[b]}, width {width}": (f"{a}_w{width}", f"{b}_w{width}")
        for a, b in GAINS
        for width in widths
    }


def describe(study: Study) -> dict[str, Any]:
    """Return what the page's template takes."""

    def compare(pairs: Mapping[str, tuple[str, str]], first_trial: int = 0) -> str:
        return show_comparisons(study.compare_all(pairs, first_trial=first_trial))

    def compare_teachers(pairs: Mapping[str, tuple[str, str]]) -> str:
        return show_comparisons(study.compare_all(pairs, get_teachers))

    def gain(first: str, second: str, collect: Collect = Lot.get_trials) -> str:
        entry = study.compare(first, second, collect)
        assert entry.gain is not None
        return _show_gain(entry.gain, entry.interval)

    def accuracies(titles: Mapping[str, str]) -> str:
        return show_accuracies({title: study.report[name] for name, title in titles.items()})

    slopes = {f"{METHODS[a]} - {METHODS[b]}": study.fit_slope(a, b, WIDTHS) for a, b in GAINS}
    planned = {path.stem for path in (STUDY / "report").glob("*.yaml")}
    sizes = {f"{name}_w{width}": f"{title}, width {width}" for width in WIDTHS for name, title in METHODS.items()}
    return {
        "accuracies": accuracies,
        "compare": compare,
        "compare_teachers": compare_teachers,
        "gain": gain,
        "teacher_gain": lambda first, second: gain(first, second, get_teachers),
        "teacher": lambda name: f"{np.mean([*get_teachers(study.report[name]).values()]):.1f}",
        "main": MAIN,
        "scratch": SCRATCH,
        "digits": DIGITS,
        "widths": WIDTHS,
        "sizes": sizes,
        "size_pairs": list_size_pairs(WIDTHS),
        "slopes": [
            (title, _show_gain(slope.value, slope.interval), _show_p(slope.p), _show_p(p), slope.n)
            for (title, slope), p in zip(slopes.items(), adjust_holm([s.p for s in slopes.values()]), strict=True)
        ],
        "development": show_development(study, {name: name.split("_")[0].upper() for name in study.development}),
        "measures": lambda titles: show_measures(study, titles),
        "unrun": sorted(planned - study.report.keys()),
        "proof": show_proof(study),
        "costs": show_costs(study),
        "spread": lambda first, second: f"{np.std(study.list_gains(first, second), ddof=1):.1f}",
        "power": show_power(),
        "cpu": study.report["erm_w8"].sweep.runs[0].machine["cpu"],
    }


def write(archive: Path, page: Path, figures: Path) -> None:
    """Write the page and the figures from the records.

    Raises:
        RunError: Records of the study of pretrained students prove nothing; see `tools.proof`.
    """
    check_records(sorted((PRETRAINED / "records").glob("*.tar.xz")), PRETRAINED / "report")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        study = Study(Path(folder))
    loader = jinja2.FileSystemLoader(STUDY)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    page.write_text(environment.get_template("results.md.j2").render(describe(study)))
    figures.mkdir(exist_ok=True)
    drawings = {
        "sizes.svg": draw_sizes(study, WIDTHS),
        "teachers.svg": draw_teachers(study, {"kd_w8": "KD", "daft_w8": "DAFT"}),
        "radii.svg": draw_radii(study, RADII),
    }
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
