"""The tables of the study of pretrained students, from the records that `tools.trials` packed."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from daft_domainbed.results.comparison import FEWEST_TRIALS
from daft_domainbed.results.statistics import bootstrap_mean, mean
from daft_domainbed.runtime.layout import TEACHERS_FOLDER
from tools.charts import Axis, Point, Series, draw_chart, fit_axis
from tools.proof import check_records
from tools.study import (
    Study,
    get_teachers,
    make_table,
    show_accuracies,
    show_comparisons,
    show_costs,
    show_equivalence,
    show_proof,
)
from tools.trials import COSTS, MEASURES

ARMS = {
    "erm": "ERM",
    "kd": "KD",
    "kd_matched": "KD matched",
    "daft": "DAFT",
    "daft_eps0": "DAFT without adversary",
    "erm_long": "ERM, DAFT's compute",
}
# The family of the primary read-out, in the order of the design.
PRIMARY = {
    "DAFT - ERM": ("daft", "erm"),
    "DAFT - KD": ("daft", "kd"),
    "DAFT - KD matched": ("daft", "kd_matched"),
    "KD - ERM": ("kd", "erm"),
}
SECONDARY = {
    "DAFT - DAFT without adversary": ("daft", "daft_eps0"),
    "DAFT - ERM, DAFT's compute": ("daft", "erm_long"),
}
SIZES = {
    f"{title}, {student}": (f"{a}{ending}", f"{b}{ending}")
    for title, a, b in (("DAFT - KD", "daft", "kd"), ("DAFT - ERM", "daft", "erm"))
    for student, ending in (("EfficientNet-Lite0", ""), ("ResNet-8, width 24", "_w24"), ("ResNet-8, width 8", "_w8"))
} | {"DAFT - KD, three frozen networks teach": ("daft_concatenated", "kd_concatenated")}
MARGIN = 1.0  # points
FIGURE = "pretrained_teachers.svg"

Groups = Mapping[str, Mapping[int, Mapping[str, float]]]  # by teacher, trial and measure


def show_study(folder: Path, figures: Path) -> str:
    """Return the study's section of the page, and draw its figure; nothing before its first report trial.

    Args:
        folder: Has `report`, `records` and the section's template.
        figures: Where the figure goes.

    Raises:
        RunError: A record proves nothing; see `tools.proof`.
    """
    archives = sorted((folder / "records").glob("*.tar.xz"))
    check_records(archives, folder / "report")
    planned = {path.stem for path in (folder / "report").glob("*.yaml")}
    with tempfile.TemporaryDirectory() as name:
        costs, measures = unpack(archives, planned, Path(name))
        studies = {weights: Study(Path(name), weights) for weights in ("averaged", "plain")}
    if not studies["plain"].report:
        return ""
    teachers = group_teachers(measures)
    if _list_fine_tuned(teachers):
        (figures / FIGURE).write_text(draw_teachers(teachers))
    loader = jinja2.FileSystemLoader(folder)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.get_template("report.md.j2").render(describe(studies, planned, costs, teachers))


def unpack(archives: Sequence[Path], report: set[str], root: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Unpack archives into a folder each for development, report and teachers.

    Returns:
        What each trial cost, and what was measured of each teacher of a report trial.
    """
    costs, measures = [], []
    for place in ("development", "report", TEACHERS_FOLDER):
        (root / place).mkdir()
    for archive in archives:
        with tarfile.open(archive) as tar:
            sweeps = {member.name.partition("/")[0] for member in tar.getmembers()}
            for member in tar.getmembers():
                sweep = member.name.partition("/")[0]
                if sweep == TEACHERS_FOLDER:
                    tar.extract(member, root, filter="data")
                elif sweep not in (COSTS, MEASURES):
                    tar.extract(member, root / ("report" if sweep in report else "development"), filter="data")
                elif content := tar.extractfile(member):
                    texts = content.read().decode()
                    if sweep == COSTS:
                        costs.append(json.loads(texts))
                    elif sweeps & report:
                        measures += [json.loads(line) for line in texts.splitlines()]
    return costs, measures


def describe(
    studies: Mapping[str, Study],
    planned: set[str],
    costs: Sequence[Mapping[str, Any]],
    teachers: Groups,
) -> dict[str, Any]:
    """Return what the section's template takes."""
    plain = studies["plain"]

    def keep_run(pairs: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
        return {title: pair for title, pair in pairs.items() if plain.report.keys() >= set(pair)}

    def compare(pairs: Mapping[str, tuple[str, str]], weights: str) -> str:
        study = studies[weights]
        return show_comparisons({title: study.compare(*pair) for title, pair in keep_run(pairs).items()})

    arms = {title: name for name, title in ARMS.items() if name in plain.report}
    seconds = sum(sweep["seconds"] for cost in costs for sweep in cost["sweeps"])
    return {
        "n_trials": len(plain.report["erm"].get_trials()) if "erm" in plain.report else 0,
        "accuracies": lambda weights: show_accuracies({t: studies[weights].report[n] for t, n in arms.items()}),
        "compare": compare,
        "compare_styles": lambda pairs, weights: show_styles(studies[weights], keep_run(pairs)),
        "compare_teachers": show_comparisons(
            {"AFT teacher - ERM teacher": plain.compare("daft", "kd", get_teachers)}
            if {"daft", "kd"} <= {*plain.report}
            else {}
        ),
        "teachers": show_teachers(teachers),
        "figure": FIGURE if _list_fine_tuned(teachers) else "",
        "equivalence": lambda pairs, weights: show_equivalence(studies[weights], keep_run(pairs), MARGIN),
        "primary": PRIMARY,
        "secondary": SECONDARY,
        "sizes": SIZES,
        "margin": MARGIN,
        "unrun": sorted(planned - plain.report.keys()),
        "proof": show_proof(plain),
        "costs": show_costs(plain),
        "elapsed_hours": f"{seconds / 3600:.1f}",
    }


_MEASURED = {
    "accuracy": "held-out accuracy, %",
    "nll": "held-out NLL",
    "margin": "held-out margin",
    "agreement": "agreement across styles, %",
    "entropy": "entropy on training styles",
}


def group_teachers(measures: Sequence[Mapping[str, Any]]) -> Groups:
    """Return what was measured of the main teacher by radius and trial, ERM first.

    A trial's number is the mean over its styles; radius 0 is the same fine-tuning without the adversary.
    """
    lines: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for line in measures:
        if isinstance(line["backbone"], str):  # the main teacher is one network
            name = "ERM" if line["kind"] == "ERM" else f"AFT, radius {line['radius']:g}"
            lines.setdefault(name, {}).setdefault(line["trial"], []).append(line)
    return {
        name: {
            trial: {key: mean([line[key] for line in of_trial]) or 0.0 for key in _MEASURED}
            for trial, of_trial in lines[name].items()
        }
        for name in sorted(lines, reverse=True)
    }


def compare_with_erm(groups: Groups, name: str, key: str) -> tuple[float, tuple[float, float] | None]:
    """Return what a teacher has more than the ERM teacher of the same trial, with its interval where trials suffice."""
    gains = [groups[name][trial][key] - groups["ERM"][trial][key] for trial in _list_shared(groups, name)]
    return mean(gains) or 0.0, bootstrap_mean(gains) if len(gains) >= FEWEST_TRIALS else None


def show_teachers(groups: Groups) -> str:
    """Return means over trials of what was measured, and the differences by trial."""
    rows = []
    for name, trials in groups.items():
        means = [mean([trial[key] for trial in trials.values()]) for key in _MEASURED]
        rows.append([name, *(f"{value:.3g}" for value in means), str(len(trials))])
    for name in _list_fine_tuned(groups):
        cells = []
        for key in _MEASURED:
            gain, interval = compare_with_erm(groups, name, key)
            cells.append(f"{gain:+.3g}" + (f" [{interval[0]:+.3g}, {interval[1]:+.3g}]" if interval else ""))
        rows.append([f"{name} - ERM", *cells, str(len(_list_shared(groups, name)))])
    return make_table(["", *_MEASURED.values(), "trials"], rows)


def draw_teachers(groups: Groups) -> str:
    """Draw what each fine-tuned teacher has more than the ERM teacher, percentages as shares: all fit one axis."""
    names = _list_fine_tuned(groups)
    series = []
    for i, name in enumerate(names):
        points = []
        for place, (key, title) in enumerate(_MEASURED.items()):
            gain, interval = compare_with_erm(groups, name, key)
            unit = 100 if title.endswith("%") else 1
            ends = (interval[0] / unit, interval[1] / unit) if interval else (None, None)
            points.append(Point(place + 0.15 * (i - (len(names) - 1) / 2), gain / unit, *ends))
        series.append(Series(name, points, is_line=False))
    # Half a place free on either side, by ticks without a text.
    ticks = [(-0.5, ""), *((float(place), key) for place, key in enumerate(_MEASURED)), (len(_MEASURED) - 0.5, "")]
    y = fit_axis("more than the ERM teacher has", series, 0.05)
    return draw_chart("What fine-tuning changes in the teacher", Axis("", ticks), y, series)


def _list_fine_tuned(groups: Groups) -> list[str]:
    return sorted(set(groups) - {"ERM"}) if "ERM" in groups else []


def _list_shared(groups: Groups, name: str) -> list[int]:
    return sorted(groups[name].keys() & groups["ERM"].keys())


def show_styles(study: Study, pairs: Mapping[str, tuple[str, str]]) -> str:
    """Return each comparison's gain on each held-out style, without a test of its own."""
    entries = {title: study.compare(*pair) for title, pair in pairs.items()}
    header = ["", *next(iter(entries.values())).gains] if entries else [""]
    rows = [
        [title, *(f"{gain:+.1f}" for gain in entry.gains.values() if gain is not None)]
        for title, entry in entries.items()
    ]
    return make_table(header, rows)
