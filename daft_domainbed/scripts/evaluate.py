"""Judge checkpoints: accuracy under attack, shift and doubt, on their own data (the protocol of ARES-Bench).

Works on every DomainBed checkpoint, ours or upstream's. Figures rest on in-splits of held-out domains and out-splits of
training domains. The same command again goes on where it was stopped, or prints what is stored.

Example:
    daft-domainbed evaluate runs/daft/model.pkl
    daft-domainbed evaluate runs/erm/model.pkl runs/daft/model.pkl --suite standard --output_dir runs/judged
    daft-domainbed evaluate runs/daft/model.pkl --norm linf --eps 8/255 --ood noise folder:textures --format json
    daft-domainbed evaluate runs/ratio/model.pkl --counterfactuals pictures
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from daft_domainbed.cli import ArgumentParser, non_negative_int, run_command
from daft_domainbed.errors import UsageError

SUITES = ("quick", "standard", "full")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `evaluate`."""
    parser = ArgumentParser(prog="daft-domainbed evaluate", doc=__doc__)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="a model.pkl")
    parser.add_argument("--output_dir", help="evaluation/ beside the checkpoint; several checkpoints need one")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seeds the choice of examples and all draws")
    parser.add_argument("--data_dir", help="where the data lie now, if not where they lay in training")
    add_asked_flags(parser)
    parser.add_argument(
        "--counterfactuals", metavar="DIR", help="draw there what makes the model see each class in held-out images"
    )
    parser.add_argument("--host", choices=["embedded", "upstream"], help="whose parts are used; the checkpoint's own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--format", choices=["text", "json"], default="text", help="default: text")
    return parser


def add_asked_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is asked of a model, which one evaluation and a sweep's have in common."""
    parser.add_argument("--suite", choices=SUITES, default="quick", help="quick takes minutes; full has AutoAttack")
    parser.add_argument(
        "--n_examples", type=non_negative_int, help="of an environment, 0 is all; 128, 256 or 1000 by the suite"
    )
    parser.add_argument(
        "--ood", nargs="+", default=[], metavar="SET", help="noise, folder:PATH, classes:A,B, or a data set's name"
    )
    parser.add_argument("--norm", nargs="+", choices=["linf", "l2"], default=["linf", "l2"], help="default: both")
    parser.add_argument("--eps", type=radius, help="the radius of single numbers, in pixel units, such as 8/255")


def radius(text: str) -> float:
    """Argument type: a radius in pixel units, a number or a fraction."""
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a radius: give a number above 0, such as 8/255 or 0.5")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the flags say, and print the cards or the json."""
    args = vars(build_parser().parse_args(argv))
    if not args["checkpoints"]:
        raise UsageError("no checkpoint: name a model.pkl, or several")
    form, pictures = args.pop("format"), args.pop("counterfactuals")
    if pictures is not None and len(args["checkpoints"]) > 1:
        raise UsageError(f"--counterfactuals {pictures} draws one model: name one checkpoint")

    from daft_domainbed.evaluation.card import format_card
    from daft_domainbed.evaluation.evaluate import EvaluateArgs, evaluate
    from daft_domainbed.runtime import stopping

    with stopping.listening(signal.SIGINT, signal.SIGTERM):
        models = evaluate(EvaluateArgs(**args))
        if pictures is not None:
            draw_pictures(args, Path(pictures))
    if form == "json":
        print(json.dumps({"schema": 1, "models": models}, indent=1))
    else:
        print("\n".join(format_card(model) for model in models))
    return 0


def draw_pictures(args: Mapping[str, Any], folder: Path) -> None:
    """Draw counterfactual images of the checkpoint."""
    from daft_domainbed.evaluation.counterfactuals import draw_held_out
    from daft_domainbed.evaluation.subject import load_subject
    from daft_domainbed.runtime.machine import find_device

    (path,), device = args["checkpoints"], find_device(args["device"])
    subject = load_subject(Path(path), "model", device=device, data_dir=args["data_dir"], host=args["host"])
    paths = draw_held_out(subject, folder, args["seed"])
    print(f"{len(paths)} pictures in {folder}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command("evaluate"))
