"""The tables of docs/adaptation.md, from records: all methods on streams of the domains that a sweep's models held out.

    python -m tools.adaptation measure runs/EmojiStyles --strong_ood noise
    python -m tools.adaptation measure runs/EmojiStyles --strong_ood digits
    python -m tools.adaptation measure runs/EmojiStyles --strong_ratio 0
    python -m tools.adaptation measure runs/six --strong_ood classes:food,plant
    python -m tools.adaptation cost runs/EmojiStyles
    python -m tools.adaptation write

`measure` and `cost` add to the records, `write` makes the tables from them. `digits` are those that the package holds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from daft_domainbed.adaptation.adapt import AdaptArgs, adapt
from daft_domainbed.adaptation.methods import METHODS
from daft_domainbed.adaptation.record import KINDS, measure
from daft_domainbed.embedded.data import load_digits
from daft_domainbed.embedded.in_memory import enlarge
from daft_domainbed.launch.evaluations import plan_adaptations
from daft_domainbed.launch.job import EvaluationJob
from daft_domainbed.methods import COMPARED
from daft_domainbed.results.statistics import mean, standard_error
from daft_domainbed.runtime.layout import JOURNAL_FILE
from daft_domainbed.runtime.machine import describe_machine
from tools.robustness import add_records, format_table, read_records

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "sweeps" / "demo" / "adaptation.jsonl.xz"
PAGE = ROOT / "docs" / "adaptation.md"
_TABLE = re.compile(r"(<!-- table (\w+): python -m tools\.adaptation write -->\n).*?(<!-- end of table -->)", re.DOTALL)


def list_students(root: Path, asked: Mapping[str, Any]) -> list[EvaluationJob]:
    """Return the adaptations of the chosen students of a sweep: of ERM, KD and DAFT."""
    jobs = plan_adaptations(root, asked)
    return [job for job in jobs if job.args.algorithm in COMPARED and not job.folder.startswith("teachers/")]


def measure_streams(root: Path, strong_ood: str, ratio: float) -> Iterator[dict[str, Any]]:
    """Yield what came of the streams of each chosen student of a sweep."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if strong_ood == "digits":
            strong_ood = f"folder:{write_digits(Path(folder) / 'digits')}"
        asked = {"strong_ood": strong_ood, "strong_ratio": ratio, "device": "cpu"}
        for k, job in enumerate(list_students(root, asked)):
            place = Path(folder) / str(k)
            adapt(AdaptArgs(str(root / job.checkpoint), output_dir=str(place), **job.asked))
            yield {"kind": "streams", "algorithm": job.args.algorithm, **read_streams(place)}


def read_streams(folder: Path) -> dict[str, Any]:
    """Return settings, counts and seconds by stream of an adaptation, and the machine that is asking."""
    first, *lines = map(json.loads, (folder / JOURNAL_FILE).read_text().splitlines())
    return {
        "settings": first["settings"],
        "findings": {line["name"]: line["finding"] for line in lines},
        "seconds": {line["name"]: line["seconds"] for line in lines},
        "peak_mb": max(line["peak_mb"] for line in lines),
        "machine": describe_machine(torch.device("cpu"), "fp32"),
    }


def write_digits(folder: Path) -> Path:
    """Write the digits that the package holds, as files."""
    folder.mkdir()
    for k, digit in enumerate(enlarge(torch.tensor(load_digits()[0]))):
        Image.fromarray(digit.numpy()).save(folder / f"{k:04}.png")
    return folder


def measure_cost(root: Path) -> Iterator[dict[str, Any]]:
    """Yield what a stream of noise costs a DAFT student, each method in a process of its own."""
    (job, *_) = (job for job in list_students(root, {}) if job.args.algorithm == "DAFT")
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--test_env", str(job.asked["test_env"]), "--methods", method, "--device", "cpu"]
            command = [sys.executable, "-m", "daft_domainbed.scripts.adapt", str(root / job.checkpoint), *flags]
            subprocess.run([*command, "--output_dir", folder], check=True, stdout=subprocess.DEVNULL)
            yield {"kind": "cost", "algorithm": "DAFT", "method": method, **read_streams(Path(folder))}


# --- tables ------------------------------------------------------------------------------------------------------


def make_accuracy_table(records: Sequence[Mapping[str, Any]], strong_ood: str | None) -> str:
    """Return a row a model and method: percentages, means over held-out domains and orders, with the standard error.

    An order's number is the mean over domains; the error is over orders.
    """
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if record["kind"] == "streams" and record["settings"]["strong_ood"] == strong_ood:
            groups[record["algorithm"]].append(record["findings"])
    kinds = ["answered", *(KINDS if strong_ood else KINDS[:1])]
    rows = []
    for algorithm in (name for name in COMPARED if name in groups):
        for method in METHODS:
            orders = [list_percentages(findings, method) for findings in groups[algorithm]]
            columns = [
                [statistics.fmean(values[kind] for values in order) for order in zip(*orders, strict=True)]
                for kind in kinds
            ]
            rows.append(
                [algorithm, method, *(f"{mean(column):.1f} ± {standard_error(column):.1f}" for column in columns)]
            )
    return format_table(["model", "method", "right", *map(str.upper, kinds[1:])], rows)


def list_percentages(findings: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    """Return the percentages of a method by order of the stream; `answered` are those right, rejected or not."""
    counts = [finding for name, finding in findings.items() if name.split(" | ")[0] == method]
    return [{**measure(c), "answered": 100 * c["answered"] / c["n_weak"]} for c in counts]


def make_cost_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a row a method: seconds a stream over all streams of the students, and memory of a process of its own."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record["kind"] == "streams" and record["settings"]["strong_ood"]:
            for name, value in record["seconds"].items():
                seconds[name.split(" | ")[0]].append(value)
    peaks = {record["method"]: record["peak_mb"] for record in records if record["kind"] == "cost"}
    rows = [[name, len(seconds[name]), statistics.median(seconds[name]), round(peaks[name])] for name in METHODS]
    return format_table(["method", "streams", "seconds, median", "peak MB"], rows)


TABLES: dict[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "noise": lambda records: make_accuracy_table(records, "noise"),
    "digits": lambda records: make_accuracy_table(records, "folder:digits"),
    "classes": lambda records: make_accuracy_table(records, "classes:food,plant"),
    "closed": lambda records: make_accuracy_table(records, None),
    "cost": make_cost_table,
}


def fill_page(text: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Return the page with its tables made anew."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]](records)}\n{found[3]}", text)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    streams = commands.add_parser("measure", help="have a sweep's students meet streams, and add them to the records")
    streams.add_argument("root", type=Path)
    streams.add_argument("--strong_ood", default="noise")
    streams.add_argument("--strong_ratio", type=float, default=1.0)
    cost = commands.add_parser("cost", help="add time and memory of a stream to the records")
    cost.add_argument("root", type=Path)
    commands.add_parser("write", help="make the tables of the page anew")
    args = parser.parse_args()
    if args.command == "measure":
        for record in measure_streams(args.root, args.strong_ood, args.strong_ratio):
            add_records([record], RECORDS)
    elif args.command == "cost":
        add_records(list(measure_cost(args.root)), RECORDS)
    else:
        PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8"), read_records(RECORDS)), encoding="utf-8")


if __name__ == "__main__":
    main()
