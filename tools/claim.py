"""The claim study, from its records to docs/results.md and its figures, byte for byte as committed.

python -m tools.claim write          read sweeps/claim/records.tar.xz, write docs/results.md and docs/figures/
python -m tools.claim pack runs/claim    collect the records of finished sweeps, without weights, into that archive
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from daft_domainbed.errors import RunError
from daft_domainbed.results.statistics import adjust_holm
from daft_domainbed.runtime.layout import DONE_FILE, RECORDS_FILE
from tools.archives import open_archive, write_archive
from tools.charts import Axis, Point, Series, draw_chart, fit_axis, make_axis
from tools.pretrained import show_study
from tools.study import (
    MEASURES,
    Collect,
    Lot,
    Study,
    get_teachers,
    show_accuracies,
    show_comparisons,
    show_costs,
    show_development,
    show_gain,
    show_measures,
    show_p,
    show_power,
    show_proof,
)

REPOSITORY = Path(__file__).resolve().parents[1]
STUDY = REPOSITORY / "sweeps" / "claim"
RECORDS = STUDY / "records.tar.xz"
PRETRAINED = STUDY / "pretrained"
PAGE = REPOSITORY / "docs" / "results.md"
FIGURES = REPOSITORY / "docs" / "figures"

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
    y = fit_axis("gain in points", series, 1.0)
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
    files = [*records, *runs.glob(MEASURES)]
    write_archive({str(file.relative_to(runs)): file.read_bytes() for file in files}, archive)
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
        return show_gain(entry.gain, entry.interval)

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
            (title, show_gain(slope.value, slope.interval), show_p(slope.p), show_p(p), slope.n)
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
    with open_archive(archive) as folder:
        study = Study(folder)
    loader = jinja2.FileSystemLoader(STUDY)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    figures.mkdir(exist_ok=True)
    pretrained = show_study(PRETRAINED, figures)
    page.write_text(environment.get_template("results.md.j2").render(describe(study) | {"pretrained": pretrained}))
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
