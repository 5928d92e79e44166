"""Say what a trained model makes of images.

RUN is a run's folder (of which the checkpoint is taken that validation chose), a checkpoint, or a folder that `export`
wrote. Images are resized as in training.

Example:
    daft-domainbed predict runs/one birds/new/*.png
    daft-domainbed predict runs/one/model.pkl a.png b.png --format json
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from daft_domainbed.cli import ArgumentParser, run_command
from daft_domainbed.errors import UsageError

if TYPE_CHECKING:
    from daft_domainbed.export.model import Prediction


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `predict`."""
    parser = ArgumentParser(prog="daft-domainbed predict", doc=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, a checkpoint, or an exported folder")
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="files of images")
    parser.add_argument("--format", choices=["text", "csv", "json"], default="text", help="default: text")
    add_which_flag(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def add_which_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says which checkpoint of a run's folder is meant."""
    parser.add_argument(
        "--which", choices=["chosen", "last"], default="chosen", help="checkpoint of a run's folder; default: chosen"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a prediction for each image."""
    args = build_parser().parse_args(argv)
    if not args.images:
        raise UsageError("no image: name a file, or several")

    from daft_domainbed.export.model import load_model
    from daft_domainbed.runtime.machine import find_device

    model = load_model(args.run, args.which).to(find_device(args.device))
    predictions = list(zip(args.images, model.predict(args.images), strict=True))
    if args.format == "json":
        rows = [
            {"file": file, "class": found.label, "probabilities": found.probabilities} for file, found in predictions
        ]
        print(json.dumps(rows, indent=1))
    elif args.format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["file", "class", *predictions[0][1].probabilities])
        writer.writerows([file, found.label, *found.probabilities.values()] for file, found in predictions)
    else:
        print("\n".join(_align(predictions)))
    return 0


def _align(predictions: Sequence[tuple[str, Prediction]]) -> Iterator[str]:
    """Yield a line an image: the file, the class, its probability."""
    wide = max(len(file) for file, _ in predictions)
    label = max(len(found.label) for _, found in predictions)
    for file, found in predictions:
        yield f"{file:<{wide}}  {found.label:<{label}}  {found.probabilities[found.label]:.3f}"


if __name__ == "__main__":
    sys.exit(run_command("predict"))
