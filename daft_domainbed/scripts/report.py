"""Write a sweep's report, one HTML file: `daft-domainbed report --input_dir DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    """Build the command's parser."""
    parser = argparse.ArgumentParser(
        prog="daft-domainbed report",
        description="Write one self-contained HTML file about a sweep: tables, training curves, teachers and students, "
        "the command behind each number, cost, what is missing. It needs no network.",
        epilog="example: daft-domainbed report --input_dir runs/EmojiStyles",
    )
    parser.add_argument("--input_dir", type=Path, required=True, help="folder of a sweep (DomainBed's too) or of a run")
    parser.add_argument("--output", type=Path, help="the file to write; default: report.html in --input_dir")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and print its path."""
    args = build_parser().parse_args(argv)
    from daft_domainbed.results.report import write_report

    print(write_report(args.input_dir, args.output or args.input_dir / "report.html"))
    return 0


if __name__ == "__main__":
    from daft_domainbed.cli import run_command

    sys.exit(run_command("report"))
