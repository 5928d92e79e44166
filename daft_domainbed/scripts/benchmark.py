"""Measure our speed against DomainBed's own loop and against the limit of plain torch.

All columns of a row are measured in turns, in one run, in processes of their own. DomainBed's column needs a clone at
DOMAINBED_ROOT. The table comes first; the last line on standard output is JSON.

Example:
    daft-domainbed benchmark
    daft-domainbed benchmark --only small_job daft_step --repeat 10
    daft-domainbed benchmark --scale full --format json
    daft-domainbed benchmark --list
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from daft_domainbed.cli import ArgumentParser, positive_int, run_command
from daft_domainbed.errors import RunError, UsageError, suggest
from daft_domainbed.runtime.stopping import Stopped

if TYPE_CHECKING:
    from daft_domainbed.benchmark.measure import Case

SCHEMA = 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `benchmark`."""
    parser = ArgumentParser(prog="daft-domainbed benchmark", doc=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows; --list shows them all")
    parser.add_argument(
        "--repeat", type=positive_int, default=5, help="measurements of each row; the table has medians"
    )
    parser.add_argument("--threads", type=positive_int, help="of each process; as many as there are cores by default")
    parser.add_argument(
        "--scale", choices=["full", "short", "tiny"], default="short", help="how much work; tiny tests the command only"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--profile", action="store_true", help="instead: where the time of three jobs goes")
    instead.add_argument("--growth", action="store_true", help="instead: how cost grows with what a sweep asks for")
    instead.add_argument("--list", action="store_true", help="instead: the rows and their goals")
    parser.add_argument("--format", choices=["text", "json"], default="text", help="json: without the table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table and the JSON."""
    args = build_parser().parse_args(argv)

    from daft_domainbed.benchmark.cases import CASES

    if args.only and (args.profile or args.growth):
        raise UsageError("--only chooses rows, and --profile and --growth have none: leave it out")
    names = args.only or list(CASES)
    for name in names:
        if name not in CASES:
            raise UsageError(f"--only: no row {name!r}.{suggest(name, CASES)} The rows are {', '.join(CASES)}")
    cases = [CASES[name] for name in dict.fromkeys(names)]
    if args.list:
        goals = [[case.name, goal.metric, str(goal), case.about] for case in cases for goal in case.goals]
        print(format_table(["name", "metric", "goal", "what is measured"], goals))
        return 0

    with _ending_in_order(signal.SIGTERM), tempfile.TemporaryDirectory(prefix="daft-benchmark-") as scratch:
        content = measure(Path(scratch), cases, args)
    if args.format == "text":
        print(format_text(content))
    print(json.dumps(content))
    failed = [row for row in content.get("rows", []) if row["error"]]
    if failed:
        raise RunError(f"row {failed[0]['name']} could not be measured: {failed[0]['error']}")
    return 0


def measure(scratch: Path, cases: Sequence[Case], args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the flags ask for, in a folder that may be written to; a row that fails does not keep the others."""
    from daft_domainbed.benchmark.measure import make_row, take_turns
    from daft_domainbed.benchmark.place import copy_clone, describe_place, get_load
    from daft_domainbed.benchmark.sizes import SIZES
    from daft_domainbed.benchmark.workers import Bench
    from daft_domainbed.runtime.machine import count_cores

    bench = Bench(scratch, SIZES[args.scale], args.threads or count_cores(), copy_clone(scratch))
    place = describe_place()
    bench.call("ours:describe")  # a first start has bytecode to write
    if bench.clone:
        bench.time("domainbed.scripts.sweep", "--help", with_host=True)
    machine = bench.call("ours:describe") | place | {"has_host": bench.clone is not None}
    content: dict[str, Any] = {"schema": SCHEMA, "machine": machine, "scale": args.scale, "repeat": args.repeat}
    if args.profile:
        from daft_domainbed.benchmark.shares import profile_jobs

        return content | {"profile": profile_jobs(bench, args.repeat)}
    if args.growth:
        from daft_domainbed.benchmark.growth import measure_growth

        return content | {"growth": measure_growth(bench)}
    rows = []
    for case in cases:
        began, load, error = time.monotonic(), get_load(), None
        values: Mapping[str, Any] = {}
        try:
            values = take_turns(case.rounds(bench), args.repeat)
        except Exception as failure:  # hours of other rows are not to be lost
            error = str(failure) or type(failure).__name__
        beside = {"load": load, "error": error}
        rows += [make_row(case, goal, values.get(goal.metric, {})) | beside for goal in case.goals]
        print(f"{case.name}: {error or f'{time.monotonic() - began:.0f} s'}", file=sys.stderr)
    return content | {"rows": rows}


@contextmanager
def _ending_in_order(number: int) -> Iterator[None]:
    """Have a signal end what is measured, and remove what was written for it."""

    def end(*_: object) -> NoReturn:
        raise Stopped("stopped; nothing was measured to the end")

    before = signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, before)


def format_text(content: Mapping[str, Any]) -> str:
    """Return what was measured as text."""
    machine = content["machine"]
    n = "" if "growth" in content else f"n = {content['repeat']}, medians; "
    lines = [
        f"{machine['cpu']}, {machine['cores_usable']} cores, {machine['memory_gib']} GiB; Python {machine['python']}, "
        f"torch {machine['torch']}, {machine['threads']} threads; commit {machine['commit'] or 'unknown'}",
        f"load before: {machine['load']}; {n}scale: {content['scale']}",
    ]
    if machine["load"] > machine["cores_usable"] / 2:
        lines.append("other processes were at work before: the figures say little")
    if not machine["has_host"]:
        lines.append("no column of the host: DOMAINBED_ROOT is not set to a clone of DomainBed")
    if "rows" in content:
        header = ["name", "metric", "unit", "ours", "host", "bare", "ratio", "goal", "met", "n"]
        lines += ["", format_table(header, [_list_cells(row) for row in content["rows"]]), "", "bare is"]
        lines += [
            f"  {name}: {what}" for name, what in {row["name"]: row["bare_is"] for row in content["rows"]}.items()
        ]
    for table in (*content.get("profile", []), *content.get("growth", [])):
        header = list(table["rows"][0])
        cells = [[_format(row[name]) for name in header] for row in table["rows"]]
        lines += ["", table["title"], format_table(header, cells)]
    return "\n".join(lines)


def _list_cells(row: Mapping[str, Any]) -> list[str]:
    medians = [_format(row[name]) for name in ("ours", "host", "bare", "ratio")]
    met = {True: "yes", False: "no", None: ""}[row["met"]]
    return [row["name"], row["metric"], row["unit"], *medians, row["goal"], met, str(row["n"])]


def _format(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:#.3g}".rstrip(".")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells under a header, in columns."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


if __name__ == "__main__":
    sys.exit(run_command("benchmark"))
