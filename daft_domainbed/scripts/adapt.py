"""Adapt a checkpoint to a stream of its held-out domain, mixed with images of no known class (OWTTT's protocol).

Every method meets the same streams, batch by batch, and rejects by the same threshold on its own score. The checkpoint
itself is never changed. The same command again goes on where it was stopped, or prints what is stored.

Example:
    daft-domainbed adapt runs/daft/model.pkl --test_env 0
    daft-domainbed adapt runs/daft/model.pkl --test_env 0 --strong_ood folder:textures --strong_ratio 0.5 --format json
    daft-domainbed adapt runs/six/model.pkl --test_env 0 --strong_ood classes:food,plant --methods test owttt --save
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Sequence

from daft_domainbed.cli import ArgumentParser, non_negative_int, positive_int, run_command

METHODS = ("source", "test", "bn", "tent", "t3a", "owttt")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `adapt`."""
    parser = ArgumentParser(prog="daft-domainbed adapt", doc=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a model.pkl")
    parser.add_argument("--test_env", type=non_negative_int, required=True, help="a held-out domain of its training")
    parser.add_argument("--n_trials", type=positive_int, default=5, help="orders of the stream; default: 5")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seeds orders and all draws")
    parser.add_argument("--data_dir", help="where the data lie now, if not where they lay in training")
    parser.add_argument("--output_dir", help="a folder below adaptation/ beside the checkpoint by default")
    parser.add_argument("--save", action="store_true", help="write the adapted checkpoint beside the given one")
    add_stream_flags(parser)
    parser.add_argument("--host", choices=["embedded", "upstream"], help="whose parts are used; the checkpoint's own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--format", choices=["text", "json"], default="text", help="default: text")
    return parser


def add_stream_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what a model meets and how, which one adaptation and a sweep's have in common."""
    parser.add_argument(
        "--strong_ood", default="noise", metavar="SET", help="noise, folder:PATH, classes:A,B, or a data set's name"
    )
    parser.add_argument(
        "--strong_ratio", type=ratio, default=1.0, help="outside images to one of the domain's; 0: none"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all of them")
    parser.add_argument("--batch_size", type=positive_int, default=64, help="of the stream; default: 64")


def ratio(text: str) -> float:
    """Argument type: a number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio: give a number from 0 on, such as 1 or 0.5")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Adapt as the flags say, and print the card or the json."""
    args = vars(build_parser().parse_args(argv))
    form = args.pop("format")
    args["methods"] = list(dict.fromkeys(args["methods"]))

    from daft_domainbed.adaptation.adapt import AdaptArgs, adapt
    from daft_domainbed.runtime import stopping

    with stopping.listening(signal.SIGINT, signal.SIGTERM):
        record, card = adapt(AdaptArgs(**args))
    print(json.dumps(record, indent=1) if form == "json" else card)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("adapt"))
