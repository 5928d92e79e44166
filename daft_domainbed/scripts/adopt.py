"""Make a checkpoint of a plain state dict, backbone and linear head, so that it can teach.

Takes DataParallel, Lightning, timm and MoCo wrappings, too. What the weights have seen is what you declare:
`--trained_on` is compared with the held-out domains of every run that they teach, trial and splits are not checked, and
records and tables say so.

Example:
    daft-domainbed adopt net.pt --backbone resnet18 --dataset folder:birds --trained_on photo ink --output_dir mine
    daft-domainbed adopt net.pt --backbone resnet50 --dataset PACS --data_dir data --trained_on P C --output_dir mine
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from daft_domainbed.cli import ArgumentParser, run_command


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `adopt`."""
    parser = ArgumentParser(prog="daft-domainbed adopt", doc=__doc__)
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="a torch or safetensors file")
    parser.add_argument("--backbone", required=True, help="which network it is: resnet18, timm/<name>, resnet8_w<N>")
    parser.add_argument("--dataset", required=True, help="a data set's name, or folder:PATH")
    parser.add_argument(
        "--trained_on", nargs="+", required=True, metavar="DOMAIN", help="every domain that it has seen"
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="of the head's outputs; default: in alphabet")
    parser.add_argument("--output_dir", required=True, help="the checkpoint's folder")
    parser.add_argument("--data_dir", help="folder of the data sets; only for those that are read from files")
    parser.add_argument("--hparams", help="JSON object, as backbone_input_size or a folder's input_size")
    parser.add_argument("--host", default="embedded", choices=["embedded", "upstream"], help="whose parts are used")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the checkpoint and print its path."""
    args = build_parser().parse_args(argv)

    from daft_domainbed.arguments import TrainArgs
    from daft_domainbed.data.place import locate
    from daft_domainbed.teachers.adopt import AdoptArgs, adopt

    run = TrainArgs(
        dataset=args.dataset, output_dir=args.output_dir, data_dir=args.data_dir, hparams=args.hparams, host=args.host
    )
    print(adopt(AdoptArgs(args.weights, args.backbone, locate(run), args.trained_on, args.classes or [])))
    print("trial and splits are not checked: what it was trained on is what you declared", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("adopt"))
