"""Write one self-contained HTML file about a sweep.

Tables, training curves, teachers against students, the command behind each number, cost, what is missing.

Example:
    daft-domainbed report --input_dir runs/EmojiStyles
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from daft_domainbed.cli import ArgumentParser, run_command
from daft_domainbed.scripts.collect_results import add_input_flag


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `report`."""
    parser = ArgumentParser(prog="daft-domainbed report", doc=__doc__)
    add_input_flag(parser)
    parser.add_argument("--output", type=Path, help="the file to write; default: report.html in the first --input_dir")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and print its path."""
    args = build_parser().parse_args(argv)

    from daft_domainbed.results.report import write_report

    print(write_report(args.input_dir, args.output or args.input_dir[0] / "report.html"))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("report"))
