"""Write a trained model as files for others: safetensors, torch.export, ONNX, and a card.

Each file is loaded again and has to answer as the model does. ONNX needs `pip install 'daft-domainbed[export]'`; the
others are written without it, too.

Example:
    daft-domainbed export runs/one exported
    daft-domainbed export runs/one/model.pkl exported
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from daft_domainbed.cli import ArgumentParser, run_command
from daft_domainbed.scripts.predict import add_which_flag


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `export`."""
    parser = ArgumentParser(prog="daft-domainbed export", doc=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or a checkpoint")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where the files are written")
    add_which_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export, and say what was written and what was left out."""
    args = build_parser().parse_args(argv)

    from daft_domainbed.export.write import export_model

    exported = export_model(args.run, args.folder, args.which)
    for name, difference in exported.checks.items():
        print(f"{args.folder / name}: logits differ by at most {difference:.2g}")
    for name, why in exported.left_out.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("export"))
