"""Print a sweep's tables: the three model selections, teachers apart from students, and what is missing.

Reads our sweeps, DomainBed's own, and the folder of a single run, also while they are running.

Example:
    daft-domainbed collect_results --input_dir runs/EmojiStyles
    daft-domainbed collect_results --input_dir runs/trials_0_1 runs/trials_2_3 --format latex
    daft-domainbed collect_results --input_dir runs/EmojiStyles --compare DAFT KD ERM
    daft-domainbed collect_results --input_dir runs/EmojiStyles --show_hparams
    daft-domainbed collect_results --input_dir runs/birds --selection oracle --dataset_name Birds --format latex
    daft-domainbed collect_results --input_dir runs/birds --checklist --format latex
    daft-domainbed collect_results --input_dir runs/birds --figures figures
    daft-domainbed collect_results --input_dir runs/EmojiStyles --robustness --format json
    daft-domainbed collect_results --input_dir runs/EmojiStyles --adaptation --format json
    daft-domainbed collect_results --input_dir runs/EmojiStyles --weights averaged
    daft-domainbed collect_results --input_dir runs/PACS --published
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from daft_domainbed.cli import ArgumentParser, run_command
from daft_domainbed.errors import UsageError

if TYPE_CHECKING:
    from daft_domainbed.results.records import Note
    from daft_domainbed.results.tables import Results


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `collect_results`."""
    parser = ArgumentParser(prog="daft-domainbed collect_results", doc=__doc__)
    add_input_flag(parser)
    formats = ["text", "markdown", "latex", "csv", "json"]
    parser.add_argument("--format", choices=formats, default="text", help="default: text")
    parser.add_argument(
        "--compare", nargs="+", metavar="ALGORITHM", help="the first one's gain over each other, paired by trial"
    )
    parser.add_argument(
        "--selection",
        choices=["training-domain", "leave-one-domain-out", "oracle"],
        help="the only one that is shown; default: all, and training-domain for --compare and --figures",
    )
    parser.add_argument(
        "--dataset_name", nargs="+", metavar="NAME", help="of the data set in print; of several: dataset=name"
    )
    parser.add_argument("--caption", help="in the place of the table's own")
    parser.add_argument(
        "--show_hparams", action="store_true", help="the draw behind each number, below the text tables"
    )
    parser.add_argument(
        "--checklist", action="store_true", help="what reviewers ask: n, steps, hyperparameters searched, cost"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="write figures, SVG and PDF, there (pip install matplotlib)"
    )
    parser.add_argument("--robustness", action="store_true", help="the table of what `sweep evaluate` measured")
    parser.add_argument("--adaptation", action="store_true", help="the tables of what `sweep adapt` measured")
    parser.add_argument(
        "--weights", choices=["plain", "averaged"], default="plain", help="whose accuracies count; default: plain"
    )
    parser.add_argument(
        "--published", action="store_true", help="instead: ERM beside DomainBed's published accuracy, a line a data set"
    )
    return parser


def add_input_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says which results are read."""
    parser.add_argument(
        "--input_dir",
        type=Path,
        nargs="+",
        required=True,
        help="folders of sweeps (DomainBed's too) or of runs; several are read as one, what is in two of them once",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables to standard output, what was left out to standard error."""
    args = build_parser().parse_args(argv)
    _check(args)

    from daft_domainbed.results.sweeps import read_sweeps

    sweep = read_sweeps(args.input_dir, args.weights)
    _print_notes(sweep.notes)
    if args.robustness:
        from daft_domainbed.results.robustness import FORMATS, build_robustness

        tables, notes = build_robustness(sweep)
        _print_notes(notes)
        sys.stdout.write(FORMATS[args.format](tables))
        return 0

    if args.adaptation:
        from daft_domainbed.results.adaptation import FORMATS as ADAPTATION_FORMATS
        from daft_domainbed.results.adaptation import build_adaptations

        adaptations, notes = build_adaptations(sweep)
        _print_notes(notes)
        sys.stdout.write(ADAPTATION_FORMATS[args.format](adaptations))
        return 0

    from daft_domainbed.results.tables import build_results, present

    results = build_results(sweep)
    names = _parse_names(args.dataset_name or [], [table.dataset for table in results.tables])
    one = args.compare or args.figures
    selection = args.selection or ("training-domain" if one else None)
    results = present(results, selection=selection, names=names, caption=args.caption or "")
    sys.stdout.write(_show(args, results))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that say nothing together."""
    if args.compare and len(args.compare) < 2:
        raise UsageError(f"--compare {args.compare[0]}: name at least two algorithms")
    asked = [
        name
        for name in ("compare", "robustness", "adaptation", "checklist", "figures", "published")
        if getattr(args, name)
    ]
    if len(asked) > 1:
        raise UsageError(f"--{asked[0]} and --{asked[1]} each give something of their own: ask for one at a time")
    for name in ("robustness", "adaptation"):
        if getattr(args, name) and args.format == "latex":
            raise UsageError(f"--{name} is a table of its own, in text, markdown, csv or json: give it alone")
    if args.published and args.format != "text":
        raise UsageError("--published is lines of text of their own: give it alone")
    if args.show_hparams and (asked or args.format != "text"):
        raise UsageError("--show_hparams is of the text tables: --format json has the hyperparameters of every number")
    if args.caption and asked:
        raise UsageError(f"--caption is of the table of accuracies, not of --{asked[0]}")


def _print_notes(notes: Iterable[Note]) -> None:
    for note in notes:
        print(f"{note.path}: {note.why}", file=sys.stderr)


def _parse_names(given: Sequence[str], datasets: Sequence[str]) -> dict[str, str]:
    """Return what data sets are called in print."""
    if not given:
        return {}
    known = list(dict.fromkeys(datasets))
    if len(given) == 1 and len(known) == 1 and not given[0].startswith(f"{known[0]}="):
        return {known[0]: given[0]}
    names = {}
    for text in given:
        name = next((name for name in known if text.startswith(f"{name}=")), text.rpartition("=")[0])
        if not name:
            raise UsageError(f"--dataset_name {text}: there are {len(known)} data sets, so write {known[0]}=NAME")
        names[name] = text[len(name) + 1 :]
    return names


def _show(args: argparse.Namespace, results: Results) -> str:
    """Return what was asked for."""
    if args.published:
        from daft_domainbed.results.published import format_published

        return format_published(results)
    if args.figures:
        from daft_domainbed.results.figures import write_figures

        return "".join(f"{path}\n" for path in write_figures(results, args.figures))
    if args.checklist:
        from daft_domainbed.results.checklist import FORMATS as CHECKLIST_FORMATS
        from daft_domainbed.results.checklist import build_checklist

        return CHECKLIST_FORMATS[args.format](build_checklist(results))
    if args.compare:
        from daft_domainbed.results.comparison import compare
        from daft_domainbed.results.comparison_formats import FORMATS as COMPARISON_FORMATS

        selection = args.selection or "training-domain"
        return COMPARISON_FORMATS[args.format](compare(results, args.compare[0], args.compare[1:], selection))

    from daft_domainbed.results.draws import format_draws
    from daft_domainbed.results.formats import FORMATS

    return FORMATS[args.format](results) + ("\n" + format_draws(results) if args.show_hparams else "")


if __name__ == "__main__":
    sys.exit(run_command("collect_results"))
