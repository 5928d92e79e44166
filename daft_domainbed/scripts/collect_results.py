"""Print a sweep's tables: the three model selections, teachers apart from students, and what is missing.

Reads our sweeps, DomainBed's own, and the folder of a single run, also while they are running.

Example:
    daft-domainbed collect_results --input_dir runs/EmojiStyles
    daft-domainbed collect_results --input_dir runs/EmojiStyles --format latex
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from daft_domainbed.cli import ArgumentParser, run_command


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `collect_results`."""
    parser = ArgumentParser(prog="daft-domainbed collect_results", doc=__doc__)
    parser.add_argument("--input_dir", type=Path, required=True, help="folder of a sweep (DomainBed's too) or of a run")
    formats = ["text", "markdown", "latex", "csv", "json"]
    parser.add_argument("--format", choices=formats, default="text", help="default: text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables to standard output, what was left out to standard error."""
    args = build_parser().parse_args(argv)

    from daft_domainbed.results.records import read_sweep
    from daft_domainbed.results.tables import FORMATS, build_results

    sweep = read_sweep(args.input_dir)
    for note in sweep.notes:
        print(f"{note.path}: {note.why}", file=sys.stderr)
    sys.stdout.write(FORMATS[args.format](build_results(sweep)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("collect_results"))
