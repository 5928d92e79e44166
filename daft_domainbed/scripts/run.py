"""Train every stage for every held-out domain of a data set, print the table, write the report.

The main job: the same as a sweep, then `collect_results`, then `report`. Running it again resumes.

Example:
    daft-domainbed run
    daft-domainbed run --n_trials 3
    daft-domainbed run --dataset folder:birds --algorithms ERM KD DAFT --steps 1000 --output_dir runs/birds
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from daft_domainbed.cli import ArgumentParser, non_negative_int, positive_int, run_command
from daft_domainbed.errors import RunError
from daft_domainbed.launch.sweep import launch
from daft_domainbed.methods import COMPARED
from daft_domainbed.scripts.sweep import FIRST_DRAW, FIRST_TRIAL, add_domain_flags, add_launch_flags, make_options
from daft_domainbed.scripts.train import add_n_checkpoints_flag, add_shared_flags


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `run`."""
    parser = ArgumentParser(prog="daft-domainbed run", doc=__doc__)
    parser.add_argument("--dataset", default="EmojiStyles", help="a data set's name, or folder:PATH")
    parser.add_argument("--algorithms", nargs="+", default=list(COMPARED), help="what is compared")
    parser.add_argument("--n_trials", type=positive_int, default=1, help="repetitions, each with its own splits")
    parser.add_argument("--n_trials_from", type=non_negative_int, default=0, help=FIRST_TRIAL)
    parser.add_argument("--n_hparams", type=positive_int, default=1, help="hyperparameter draws; the first: defaults")
    parser.add_argument("--n_hparams_from", type=non_negative_int, default=0, help=FIRST_DRAW)
    add_domain_flags(parser)
    parser.add_argument("--output_dir", help="the sweep's folder; runs/<dataset> by default")
    parser.add_argument("--steps", type=positive_int, help="updates; the data set's own number by default")
    parser.add_argument("--command_launcher", default="local", help="local, multi_gpu, ray, or one of your own")
    add_shared_flags(parser)
    add_n_checkpoints_flag(parser)
    add_launch_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the main job."""
    args = vars(build_parser().parse_args(argv))

    from daft_domainbed.arguments import SweepArgs, name_dataset

    options, keep, launcher = make_options(args), args["keep"] or "all", args["command_launcher"]
    dataset = args["dataset"]
    name = re.sub(r"[^\w.-]+", "_", name_dataset(dataset).removeprefix("folder:"))
    args["output_dir"] = args["output_dir"] or str(_choose_folder(Path("runs", name), dataset))
    args["threads"] = args["threads"] or 1
    own = {field: value for field, value in args.items() if field in SweepArgs.__dataclass_fields__}
    is_each_in_turn = args["test_envs"] is None and not args["single_source"]
    failure = None
    try:
        launch(
            SweepArgs(datasets=[dataset], single_test_envs=is_each_in_turn, **own),
            options,
            launcher=launcher,
            ask=False,
            keep=keep,
        )
    except RunError as error:  # the others have results all the same
        failure = error

    from daft_domainbed.scripts import collect_results, report

    root = Path(args["output_dir"])
    collect_results.main(["--input_dir", str(root)])
    report.main(["--input_dir", str(root)])
    if failure:
        raise failure
    return 0


def _choose_folder(folder: Path, dataset: str) -> Path:
    """Return the folder of a data set's runs: another one than that of a data set that only has the same name."""
    from daft_domainbed.data.place import identify
    from daft_domainbed.launch.plan_file import read_begun_data

    begun = read_begun_data(folder) if dataset.startswith("folder:") else {}
    ids = {place["data_id"] for place in begun.values()}
    if not ids or None in ids or (own := identify(dataset)) in ids:
        return folder
    return folder.with_name(f"{folder.name}-{own[:8]}")


if __name__ == "__main__":
    sys.exit(run_command("run"))
