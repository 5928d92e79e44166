"""Run a module of your own, unmodified DomainBed with everything of ours registered.

The clone at DOMAINBED_ROOT (or `domainbed` on the import path) runs as it stands, in this process; commands that its
sweep hands to any launcher become `host` commands too.

Example:
    daft-domainbed host domainbed.scripts.train --data_dir data --dataset PACS --algorithm DAFT --test_envs 0
    daft-domainbed host domainbed.scripts.sweep launch --data_dir data --output_dir sweep --command_launcher local
    daft-domainbed host domainbed.scripts.collect_results --input_dir sweep
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from daft_domainbed.cli import ArgumentParser, run_command
from daft_domainbed.errors import UsageError

TRAIN, SWEEP = "domainbed.scripts.train", "domainbed.scripts.sweep"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `host`."""
    parser = ArgumentParser(prog="daft-domainbed host", doc=__doc__)
    parser.add_argument("module", help="such as domainbed.scripts.train")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its own arguments")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module as `__main__`."""
    args = build_parser().parse_args(argv)

    from daft_domainbed import plugin
    from daft_domainbed.host import contract
    from daft_domainbed.hparams import parse_json
    from daft_domainbed.plugin import upstream
    from daft_domainbed.plugin.defaults import check_input, check_user_hparams, refuse_engine_hparams
    from daft_domainbed.plugin.registry import REGISTRY

    host = contract.find_host("upstream")
    if not args.module.startswith("domainbed.") or importlib.util.find_spec(args.module) is None:
        raise UsageError(f"no module {args.module!r} in DomainBed: name one such as {TRAIN}")
    plugin.register(host)
    known, _ = _build_upstream_parser().parse_known_args(args.args)
    for name in [*known.datasets, known.dataset]:
        if name.startswith("folder:"):
            upstream.add_folder_dataset(host, name)
    user = REGISTRY.user_hparams = parse_json(known.hparams)
    refuse_engine_hparams(user)
    for algorithm in [*known.algorithms, known.algorithm]:
        contract.get_algorithm_class(host, algorithm)
    for dataset in known.datasets or [known.dataset]:
        # Upstream would take a hyperparameter that no algorithm knows in silence.
        facts = contract.describe_dataset(host, dataset, user)
        check_input(known.algorithms or [known.algorithm], facts)
        check_user_hparams(host, user, host.algorithms.ALGORITHMS, facts, asked=["any registered algorithm"])
    if args.module == TRAIN:
        if {"-h", "--help"} & set(args.args):
            raise UsageError(
                "DomainBed's own --help of its train script fails (a % in one of its texts); its flags are those of "
                "'daft-domainbed train --help' without --host, --device, --precision, --teachers_dir, --image_cache, "
                "--feature_cache, --log, --leave_out_classes, --cap_batch_size and --data_seed"
            )
        _watch_training(host, args.args)
    if args.module == SWEEP:
        upstream.redirect_launchers(host, f"{shlex.quote(sys.executable)} -m daft_domainbed.scripts.host")
    argv_before, streams = sys.argv, (sys.stdout, sys.stderr)
    sys.argv = [args.module, *args.args]
    try:
        runpy.run_module(args.module, run_name="__main__", alter_sys=True)
    finally:
        # Upstream puts its own tees in their place and leaves them there.
        sys.argv, (sys.stdout, sys.stderr) = argv_before, streams
    return 0


def _build_upstream_parser() -> argparse.ArgumentParser:
    """Return a parser of what has to be known of upstream's arguments beforehand; upstream parses them itself."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset", default="RotatedMNIST")
    parser.add_argument("--datasets", nargs="+", default=[])
    parser.add_argument("--algorithm", default="ERM")
    parser.add_argument("--algorithms", nargs="+", default=[])
    parser.add_argument("--hparams")
    return parser


def _watch_training(host: Any, arguments: Sequence[str]) -> None:
    """Let the algorithm of upstream's own loop know its run, without which no teacher can be checked."""
    from daft_domainbed.arguments import TrainArgs
    from daft_domainbed.plugin import upstream
    from daft_domainbed.scripts.train import build_parser as build_train_parser
    from daft_domainbed.training.upstream_run import follow_upstream_run

    args = build_train_parser().parse_args(arguments)
    if names := [env for env in args.test_envs if not env.isdecimal()]:
        raise UsageError(f"--test_envs {names[0]}: DomainBed's own script takes numbers alone")
    values = vars(args) | {"host": "upstream", "test_envs": list(map(int, args.test_envs))}
    upstream.watch_dataset(host, args.dataset, follow_upstream_run(TrainArgs(**values)))


if __name__ == "__main__":
    sys.exit(run_command("host"))
