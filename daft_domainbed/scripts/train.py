"""Train one model, or go on with the one that was interrupted in the same folder.

Flags, records and files are those of `domainbed.scripts.train`; KD and DAFT train the teachers that they miss first.

Example:
    daft-domainbed train --dataset EmojiStyles --algorithm DAFT --test_envs 3 --output_dir runs/daft
    daft-domainbed train --dataset PACS --data_dir data --algorithm KD --hparams '{"backbone": "resnet18"}'
    daft-domainbed train --dataset folder:birds --algorithm ERM --steps 1000 --device cuda --precision bf16
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from daft_domainbed.cli import ArgumentParser, fraction, non_negative_int, positive_int, run_command

PRECISIONS = ("fp32", "bf16", "fp16", "frozen_bf16")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `train`."""
    parser = ArgumentParser(prog="daft-domainbed train", doc=__doc__)
    parser.add_argument("--dataset", default="RotatedMNIST", help="a data set's name, or folder:PATH")
    parser.add_argument(
        "--algorithm", default="ERM", help="one that 'daft-domainbed methods' lists, or any of the host's"
    )
    parser.add_argument(
        "--test_envs", nargs="+", default=["0"], help="held-out environments, by number or name; all of one run"
    )
    parser.add_argument("--output_dir", default="train_output", help="the run's folder")
    parser.add_argument("--hparams_seed", type=non_negative_int, default=0, help="0: defaults; else a random draw")
    parser.add_argument("--trial_seed", type=non_negative_int, default=0, help="seeds the splits and the random draws")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seeds everything else")
    parser.add_argument("--steps", type=positive_int, help="updates; the data set's own number by default")
    parser.add_argument("--save_model_every_checkpoint", action="store_true", help="keep model_step<N>.pkl as well")
    parser.add_argument(
        "--data_seed", type=non_negative_int, help="seeds the data set, where it differs from --seed (teachers)"
    )
    add_shared_flags(parser)
    return parser


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that a single run and a whole sweep have in common."""
    parser.add_argument("--data_dir", help="folder of the data sets; only for those that are read from files")
    parser.add_argument(
        "--hparams",
        help='JSON object of hyperparameters, over defaults or random draws; {"ERM": {...}} in it is for ERM alone',
    )
    parser.add_argument(
        "--task", default="domain_generalization", choices=["domain_generalization", "domain_adaptation"]
    )
    parser.add_argument("--checkpoint_freq", type=positive_int, help="updates between evaluations")
    parser.add_argument("--holdout_fraction", type=fraction, default=0.2, help="out-split's share of a domain")
    parser.add_argument(
        "--uda_holdout_fraction", type=fraction, default=0.0, help="unlabelled share of a held-out domain's in-split"
    )
    parser.add_argument(
        "--leave_out_classes",
        type=class_names,
        metavar="A,B",
        help="classes that no environment shows and the model does not know, for evaluate --ood classes:A,B",
    )
    parser.add_argument(
        "--cap_batch_size", action="store_true", help="lower a batch_size that the smallest training domain cannot fill"
    )
    parser.add_argument("--skip_model_save", action="store_true", help="keep the records only")
    parser.add_argument("--host", default="embedded", choices=["embedded", "upstream"], help="whose parts are used")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=PRECISIONS,
        help="fp16 on CUDA only; frozen_bf16: what is frozen in bf16, all else in fp32",
    )
    parser.add_argument("--teachers_dir", help="the store of teachers; teachers/ beside the output folder by default")
    parser.add_argument(
        "--image_cache", metavar="DIR", help="decode the images of folders once, into files that jobs share"
    )
    parser.add_argument(
        "--feature_cache", metavar="DIR", help="keep the features of frozen backbones, in files that jobs share"
    )
    parser.add_argument("--log", nargs="+", choices=LOGS, help="copy the records there, too; results.jsonl stays")


LOGS = ("tensorboard", "wandb")


def add_n_checkpoints_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that sets the interval between evaluations from the steps."""
    parser.add_argument(
        "--n_checkpoints",
        type=positive_int,
        help="evaluations of a run, in the place of --checkpoint_freq; teachers keep DomainBed's interval",
    )


def class_names(text: str) -> list[str]:
    """Argument type: names with commas between them, in the order of the alphabet, each once."""
    names = sorted({name.strip() for name in text.split(",") if name.strip()})
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no class: give some, as in animal,food")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say."""
    args = build_parser().parse_args(argv)

    from daft_domainbed.arguments import TrainArgs
    from daft_domainbed.data.place import locate
    from daft_domainbed.launch.domains import find_test_envs
    from daft_domainbed.runtime import stopping
    from daft_domainbed.training.engine import train

    with stopping.listening(signal.SIGINT, signal.SIGTERM):
        args.test_envs = find_test_envs(args.test_envs, args.dataset, args.host)
        train(locate(TrainArgs(**vars(args))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("train"))
