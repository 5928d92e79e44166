"""The tables of docs/adaptation.md, from records: all methods on streams of the domains that a sweep's models held out.

    python -m tools.adaptation measure runs/EmojiStyles --strong_ood noise
    python -m tools.adaptation measure runs/EmojiStyles --strong_ood digits
    python -m tools.adaptation measure runs/EmojiStyles --strong_ratio 0
    python -m tools.adaptation measure runs/six --strong_ood classes:food,plant
    python -m tools.adaptation cost runs/EmojiStyles
    python -m tools.adaptation rates runs/EmojiStyles
    python -m tools.adaptation write

All but `write` add to the records, and `write` makes the tables from them. `digits` are those that the package holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from daft_domainbed.adaptation.adapt import AdaptArgs, adapt, meet
from daft_domainbed.adaptation.methods import METHODS
from daft_domainbed.adaptation.network import Network
from daft_domainbed.adaptation.owttt import Owttt, Settings
from daft_domainbed.adaptation.prototypes import NearestPrototype
from daft_domainbed.adaptation.record import KINDS, measure
from daft_domainbed.adaptation.sources import SourceStatistics, measure_sources
from daft_domainbed.adaptation.stream import Stream, make_stream
from daft_domainbed.embedded.data import load_digits
from daft_domainbed.embedded.in_memory import enlarge
from daft_domainbed.evaluation.outside import find_outside
from daft_domainbed.evaluation.subject import Subject, load_subject
from daft_domainbed.launch.evaluations import plan_adaptations
from daft_domainbed.launch.job import EvaluationJob
from daft_domainbed.methods import COMPARED
from daft_domainbed.results.statistics import mean, standard_error
from daft_domainbed.runtime.layout import JOURNAL_FILE
from daft_domainbed.runtime.machine import describe_machine, measure_peak_memory
from tools.archives import add_records, read_records
from tools.marked_tables import fill_tables
from tools.robustness import format_table

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "sweeps" / "demo" / "adaptation.jsonl.xz"
PAGE = ROOT / "docs" / "adaptation.md"
RATES, RATE_ORDERS, COST_ORDERS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2), 2, 5


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
    lines = [line for line in lines if "name" in line]
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
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found = pool.submit(_meet_noise, root / job.checkpoint, job.asked["test_env"], method).result()
        yield {"kind": "cost", "algorithm": "DAFT", "method": method, **found}


def _meet_noise(path: Path, test_env: int, method: str) -> dict[str, Any]:
    """Return the processor seconds of some streams, and the most memory that this process has held."""
    torch.set_num_threads(1)
    subject = load_subject(path, "", device=torch.device("cpu"))
    source = measure_sources(subject)
    stream = make_stream(subject, test_env, find_outside("noise", subject, None), 1.0, 0)
    seconds = []
    for trial in range(COST_ORDERS):
        started = time.process_time()
        meet(METHODS[method](Network(subject.model), source), stream, trial, AdaptArgs.batch_size)
        seconds.append(time.process_time() - started)
    peak = measure_peak_memory(subject.model.device)
    return {"seconds": seconds, "peak_mb": peak, "machine": describe_machine(subject.model.device, "fp32")}


def measure_rates(root: Path) -> Iterator[dict[str, Any]]:
    """Yield what OWTTT makes of noise at several learning rates, on the held-out domain and on training domains.

    The latter streams are training domains' out-splits, one domain after the other: they know no label of the held-out
    domain, and no image of it.
    """
    torch.set_num_threads(1)
    for job in list_students(root, {}):
        subject = load_subject(root / job.checkpoint, "", device=torch.device("cpu"))
        outside, source = find_outside("noise", subject, None), measure_sources(subject)
        test_env = job.asked["test_env"]
        kinds = {
            "held-out": [make_stream(subject, test_env, outside, 1.0, 0)],
            "training": [
                _take_out_split(make_stream(subject, env, outside, 1.0, 0), env)
                for env in range(len(subject.environments))
                if env != test_env
            ],
        }
        for rate in RATES:
            record = {"kind": "rate", "algorithm": job.args.algorithm, "test_env": test_env, "rate": rate}
            for kind, streams in kinds.items():
                record[kind] = [_meet_all(subject, source, rate, streams, trial) for trial in range(RATE_ORDERS)]
            yield {**record, "machine": describe_machine(torch.device("cpu"), "fp32")}


def _take_out_split(stream: Stream, env: int) -> Stream:
    keys = sorted(int(key) for key in stream.subject.data.out_splits[env].keys)
    return replace(stream, weak=keys, strong=stream.strong[: len(keys)])


def _meet_all(
    subject: Subject, source: SourceStatistics, rate: float, streams: Sequence[Stream], trial: int
) -> dict[str, int]:
    """Return OWTTT's counts over streams that it meets one after the other; at rate 0, those without adaptation."""
    network = Network(subject.model)
    method = Owttt(network, source, Settings(lr=rate)) if rate else NearestPrototype(network, source)
    found = [meet(method, stream, trial, AdaptArgs.batch_size) for stream in streams]
    return {name: sum(counts[name] for counts in found) for name in found[0] if name != "notice"}


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
    """Return the percentages of a method by order of the stream."""
    counts = [finding for name, finding in findings.items() if name.split(" | ")[0] == method]
    return [measure_all(c) for c in counts]


def measure_all(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the percentages of a stream; `answered` are known classes right, rejected or not."""
    return {**measure(counts), "answered": 100 * counts["answered"] / counts["n_weak"]}


def make_cost_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a row a method: processor seconds a stream, and the memory of a process of its own."""
    costs = [record for record in records if record["kind"] == "cost"]
    rows = [[cost["method"], statistics.median(cost["seconds"]), round(cost["peak_mb"])] for cost in costs]
    return format_table(["method", "seconds a stream", "peak MB"], rows)


def make_rates_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a row a learning rate of OWTTT: percentages on training domains and held-out ones, means over models."""
    rows = []
    for rate in RATES:
        cells: list[Any] = [f"{rate:g}" if rate else "test"]
        for kind in ("training", "held-out"):
            counts = [c for r in records if r["kind"] == "rate" and r["rate"] == rate for c in r[kind]]
            found = [measure_all(c) for c in counts]
            cells += [statistics.fmean(values[name] for values in found) for name in ("answered", *KINDS)]
        rows.append(cells)
    names = ["right", *map(str.upper, KINDS)]
    head = ["learning rate", *(f"{kind}: {name}" for kind in ("training", "held-out") for name in names)]
    return format_table(head, rows)


TABLES: dict[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "noise": lambda records: make_accuracy_table(records, "noise"),
    "digits": lambda records: make_accuracy_table(records, "folder:digits"),
    "classes": lambda records: make_accuracy_table(records, "classes:food,plant"),
    "closed": lambda records: make_accuracy_table(records, None),
    "cost": make_cost_table,
    "rates": make_rates_table,
}


def fill_page(text: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Return the page with its tables made anew."""
    return fill_tables(text, "adaptation", lambda name: TABLES[name](records))


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    streams = commands.add_parser("measure", help="have a sweep's students meet streams, and add them to the records")
    streams.add_argument("root", type=Path)
    streams.add_argument("--strong_ood", default="noise")
    streams.add_argument("--strong_ratio", type=float, default=1.0)
    cost = commands.add_parser("cost", help="add the memory of a stream to the records")
    rates = commands.add_parser("rates", help="add what OWTTT makes of noise at several learning rates to the records")
    for parser_of in (cost, rates):
        parser_of.add_argument("root", type=Path)
    commands.add_parser("write", help="make the tables of the page anew")
    args = parser.parse_args()
    if args.command == "measure":
        for record in measure_streams(args.root, args.strong_ood, args.strong_ratio):
            add_records([record], RECORDS)
    elif args.command in ("cost", "rates"):
        measure_more = measure_cost if args.command == "cost" else measure_rates
        add_records(list(measure_more(args.root)), RECORDS)
    else:
        PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8"), read_records(RECORDS)), encoding="utf-8")


if __name__ == "__main__":
    main()
