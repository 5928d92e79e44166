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


def show_study(folder: Path) -> str:
    """Return the study's section of the page; nothing before its first report trial.

    Args:
        folder: Has `report`, `records` and the section's template.

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
    loader = jinja2.FileSystemLoader(folder)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.get_template("report.md.j2").render(describe(studies, planned, costs, measures))


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
    measures: Sequence[Mapping[str, Any]],
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
        "teachers": show_teachers(measures),
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


def show_teachers(measures: Sequence[Mapping[str, Any]]) -> str:
    """Return means over trials of what was measured of the main teacher by radius, and the differences by trial.

    A trial's number is the mean over its styles; radius 0 is the same fine-tuning without the adversary.
    """
    lines: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for line in measures:
        if isinstance(line["backbone"], str):  # the main teacher is one network
            name = "ERM" if line["kind"] == "ERM" else f"AFT, radius {line['radius']:g}"
            lines.setdefault(name, {}).setdefault(line["trial"], []).append(line)
    groups = {
        name: {
            trial: {key: mean([line[key] for line in of_trial]) or 0.0 for key in _MEASURED}
            for trial, of_trial in trials.items()
        }
        for name, trials in lines.items()
    }
    rows = []
    for name in sorted(groups, reverse=True):  # ERM first
        values = [[trial[key] for trial in groups[name].values()] for key in _MEASURED]
        rows.append([name, *(f"{mean(numbers):.3g}" for numbers in values), str(len(groups[name]))])
    for name in sorted(set(groups) - {"ERM"}):
        shared = sorted(groups[name].keys() & groups.get("ERM", {}).keys())
        cells = []
        for key in _MEASURED:
            gains = [groups[name][trial][key] - groups["ERM"][trial][key] for trial in shared]
            low, high = bootstrap_mean(gains)
            cells.append(f"{mean(gains):+.3g}" + (f" [{low:+.3g}, {high:+.3g}]" if len(gains) >= FEWEST_TRIALS else ""))
        rows.append([f"{name} - ERM", *cells, str(len(shared))])
    return make_table(["", *_MEASURED.values(), "trials"], rows)


def show_styles(study: Study, pairs: Mapping[str, tuple[str, str]]) -> str:
    """Return each comparison's gain on each held-out style, without a test of its own."""
    entries = {title: study.compare(*pair) for title, pair in pairs.items()}
    header = ["", *next(iter(entries.values())).gains] if entries else [""]
    rows = [
        [title, *(f"{gain:+.1f}" for gain in entry.gains.values() if gain is not None)]
        for title, entry in entries.items()
    ]
    return make_table(header, rows)
