"""Print a sweep's tables: the three model selections, teachers apart from students, and what is missing.

Reads our sweeps, DomainBed's own, and the folder of a single run, also while they are running.

Example:
    daft-domainbed collect_results --input_dir runs/EmojiStyles
    daft-domainbed collect_results --input_dir runs/EmojiStyles --format latex
    daft-domainbed collect_results --input_dir runs/EmojiStyles --compare DAFT KD ERM
    daft-domainbed collect_results --input_dir runs/EmojiStyles --show_hparams
    daft-domainbed collect_results --input_dir runs/EmojiStyles --robustness --format json
    daft-domainbed collect_results --input_dir runs/EmojiStyles --weights averaged
    daft-domainbed collect_results --input_dir runs/PACS --published
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from daft_domainbed.cli import ArgumentParser, run_command
from daft_domainbed.errors import UsageError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `collect_results`."""
    parser = ArgumentParser(prog="daft-domainbed collect_results", doc=__doc__)
    parser.add_argument("--input_dir", type=Path, required=True, help="folder of a sweep (DomainBed's too) or of a run")
    formats = ["text", "markdown", "latex", "csv", "json"]
    parser.add_argument("--format", choices=formats, default="text", help="default: text")
    parser.add_argument(
        "--compare", nargs="+", metavar="ALGORITHM", help="the first one's gain over each other, paired by trial"
    )
    parser.add_argument(
        "--show_hparams", action="store_true", help="the draw behind each number, below the text tables"
    )
    parser.add_argument("--robustness", action="store_true", help="the table of what `sweep evaluate` measured")
    parser.add_argument(
        "--weights", choices=["plain", "averaged"], default="plain", help="whose accuracies count; default: plain"
    )
    parser.add_argument(
        "--published", action="store_true", help="instead: ERM beside DomainBed's published accuracy, a line a data set"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables to standard output, what was left out to standard error."""
    args = build_parser().parse_args(argv)
    if args.compare and len(args.compare) < 2:
        raise UsageError(f"--compare {args.compare[0]}: name at least two algorithms")
    if args.compare and args.format not in ("text", "json"):
        raise UsageError(f"--compare is printed as text or json, not as {args.format}")

    if args.robustness and (args.compare or args.format == "latex"):
        raise UsageError("--robustness is a table of its own, in text, markdown, csv or json: give it alone")

    if args.published and (args.compare or args.robustness or args.format != "text"):
        raise UsageError("--published is lines of text of their own: give it alone")

    from daft_domainbed.results.comparison import compare, format_comparisons
    from daft_domainbed.results.draws import format_draws
    from daft_domainbed.results.formats import FORMATS
    from daft_domainbed.results.published import format_published
    from daft_domainbed.results.robustness import FORMATS as ROBUSTNESS_FORMATS
    from daft_domainbed.results.robustness import build_robustness
    from daft_domainbed.results.sweeps import read_sweep
    from daft_domainbed.results.tables import build_results

    sweep = read_sweep(args.input_dir, args.weights)
    for note in sweep.notes:
        print(f"{note.path}: {note.why}", file=sys.stderr)
    if args.robustness:
        tables, notes = build_robustness(sweep)
        for note in notes:
            print(f"{note.path}: {note.why}", file=sys.stderr)
        sys.stdout.write(ROBUSTNESS_FORMATS[args.format](tables))
        return 0
    results = build_results(sweep)
    if args.show_hparams and args.format != "text":
        raise UsageError("--show_hparams is of the text tables: --format json has the hyperparameters of every number")
    if args.published:
        sys.stdout.write(format_published(results))
        return 0
    if args.compare:
        comparisons = compare(results, args.compare[0], args.compare[1:])
        as_json = json.dumps([asdict(entry) for entry in comparisons], indent=1) + "\n"
        sys.stdout.write(as_json if args.format == "json" else format_comparisons(comparisons))
    else:
        sys.stdout.write(FORMATS[args.format](results))
        if args.show_hparams:
            sys.stdout.write("\n" + format_draws(results))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("collect_results"))
