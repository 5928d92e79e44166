"""Launch a sweep with all its stages, show how it stands, evaluate or adapt its choices, remove what is incomplete.

`launch` again goes on with what is not done; what is trained, and with how many threads, is then taken from the sweep.
`rerun` trains what the search in --from chose by training-domain validation, in --n_trials further trials. `status`
needs --output_dir alone. `evaluate` asks what `daft-domainbed evaluate` does of every checkpoint that training-domain
validation chose, and of the teachers behind them; `collect_results --robustness` shows the answers. `adapt` is the same
for `daft-domainbed adapt` (--n_trials are orders of the stream) and `collect_results --adaptation`. Launchers: local,
multi_gpu, slurm, ray, dummy (prints the commands), one of an installed package, or one of your DomainBed's with --host
upstream.

Example:
    daft-domainbed sweep launch --datasets EmojiStyles --n_trials 3 --n_hparams 1 --single_test_envs --output_dir runs/e
    daft-domainbed sweep launch --config sweeps/pacs/sweep.yaml --data_dir data --command_launcher slurm
    daft-domainbed sweep rerun --from runs/e --output_dir runs/e_again --n_trials 5
    daft-domainbed sweep status --output_dir runs/e
    daft-domainbed sweep evaluate --output_dir runs/e --suite standard
    daft-domainbed sweep adapt --output_dir runs/e --strong_ood noise
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daft_domainbed.cli import ArgumentParser, non_negative_int, positive_int, run_command
from daft_domainbed.errors import UsageError
from daft_domainbed.launch.sweep import (
    ask_chosen,
    collect_rerun_args,
    collect_sweep_args,
    delete_incomplete,
    launch,
    show_status,
)
from daft_domainbed.methods import ADAPTATION, COMPARED, EVALUATION
from daft_domainbed.scripts.adapt import add_stream_flags
from daft_domainbed.scripts.evaluate import add_asked_flags
from daft_domainbed.scripts.train import add_n_checkpoints_flag, add_shared_flags

if TYPE_CHECKING:
    from daft_domainbed.launch.options import Options


# What is asked of chosen checkpoints: the jobs' stage, the flags that are for it alone, the table of the answers.
ASKED = {
    "evaluate": (EVALUATION, ("suite", "n_examples", "ood", "norm", "eps"), "--robustness"),
    "adapt": (ADAPTATION, ("strong_ood", "strong_ratio", "methods", "batch_size"), "--adaptation"),
}
SHARED = ("seed", "data_dir", "device", "host")
FIRST_TRIAL = "the first trial, by default 0: --n_trials 4 --n_trials_from 2 is trials 2 and 3"
FIRST_DRAW = "the first draw, by default 0, the defaults: --n_hparams 20 --n_hparams_from 1 is draws 1 to 19"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `sweep`; a flag that is not given is no attribute of what it parses."""
    parser = ArgumentParser(prog="daft-domainbed sweep", doc=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("command", choices=["launch", "rerun", "status", "evaluate", "adapt", "delete_incomplete"])
    parser.add_argument("--config", type=Path, help="a sweep.yaml, whose keys are these flags; flags go before it")
    parser.add_argument("--output_dir", help="the sweep's folder")
    parser.add_argument("--from", dest="search", metavar="DIR", help="rerun: the folder of the search")
    parser.add_argument(
        "--choose",
        choices=["per-algorithm", "per-environment"],
        help="rerun: one draw for all held-out domains (default), or one each",
    )
    parser.add_argument("--datasets", nargs="+", help="names of data sets, or folder:PATH")
    parser.add_argument("--algorithms", nargs="+", help=f"default: {' '.join(COMPARED)}")
    parser.add_argument("--n_trials", type=positive_int, help="repetitions, each with its own splits; default: 3")
    parser.add_argument("--n_trials_from", type=non_negative_int, help=FIRST_TRIAL)
    parser.add_argument(
        "--n_hparams", type=positive_int, help="hyperparameter draws, the first being the defaults; default: 20"
    )
    parser.add_argument("--n_hparams_from", type=non_negative_int, help=FIRST_DRAW)
    parser.add_argument("--single_test_envs", action="store_true", help="no pairs of held-out domains")
    add_domain_flags(parser)
    parser.add_argument("--seed", type=non_negative_int, help="another one makes another sweep; default: 0")
    parser.add_argument("--steps", type=positive_int, help="updates; the data set's own number by default")
    add_shared_flags(parser)
    add_n_checkpoints_flag(parser)
    add_asked_flags(parser)
    add_stream_flags(parser)
    add_launch_flags(parser)
    parser.add_argument("--command_launcher", help="local (default), multi_gpu, slurm, ray, dummy, or one of your own")
    parser.add_argument("--skip_confirmation", action="store_true", help="do not ask")
    for action in parser._actions:  # the shared flags have defaults of their own
        action.default = argparse.SUPPRESS
    return parser


def add_domain_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which domains are held out, where not each in turn is."""
    parser.add_argument(
        "--test_envs",
        nargs="+",
        metavar="A,B",
        help="sets of held-out domains, by number or name, commas within a set: 0,1 noto is a pair and a single one",
    )
    parser.add_argument(
        "--single_source", action="store_true", help="train on each domain alone, and test on every other"
    )


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a sweep is launched, which have no influence on its numbers."""
    parser.add_argument("--n_jobs", type=positive_int, help="jobs at a time; a core each, or a GPU each, by default")
    parser.add_argument("--threads", type=positive_int, help="threads a job, on which numbers may depend; default: 1")
    parser.add_argument("--slurm", nargs="+", metavar="KEY=VALUE", help="Slurm's own options, as in partition=gpu")
    parser.add_argument("--max_array_size", type=positive_int, help="of one Slurm job array; default: 1000")
    parser.add_argument("--ray_address", help="of a running Ray cluster; one is started on this machine by default")
    parser.add_argument(
        "--keep", choices=["all", "chosen"], help="chosen: in the end only weights that a selection chose stay"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Launch, show or clean a sweep."""
    given = vars(build_parser().parse_args(argv))
    on_command_line = given
    if "config" in given:
        given = read_config(given["config"], given["command"]) | given
    launcher = given.get("command_launcher", "local")
    command = given.pop("command")
    if "output_dir" not in given:
        raise UsageError("--output_dir is needed: the sweep's folder")
    root = Path(given["output_dir"])
    _check_asked_flags(on_command_line, command)
    if command == "status":
        show_status(root)
    elif command == "delete_incomplete":
        delete_incomplete(root, ask=not given.get("skip_confirmation", False))
    elif command in ASKED:
        _check_launcher_flags(on_command_line, launcher)
        stage, own, table = ASKED[command]
        asked = {name: _make_absolute(name, given[name]) for name in (*own, *SHARED) if name in given}
        if command == "adapt" and "n_trials" in on_command_line:  # a file's are the sweep's, not a stream's orders
            asked["n_trials"] = on_command_line["n_trials"]
        ask = not given.get("skip_confirmation", False)
        ask_chosen(root, stage, asked, make_options(given), launcher=launcher, ask=ask)
        where = shlex.quote(str(root))
        print(f"results: daft-domainbed collect_results --input_dir {where} {table}", file=sys.stderr)
    else:
        options = make_options(given)
        _check_launcher_flags(on_command_line, launcher)
        is_launched = launch(
            collect_rerun_args(given) if command == "rerun" else collect_sweep_args(given),
            options,
            launcher=launcher,
            ask=not given.get("skip_confirmation", False),
            keep=given.get("keep", "all"),
        )
        if is_launched:
            print(f"results: daft-domainbed collect_results --input_dir {shlex.quote(str(root))}", file=sys.stderr)
    return 0


def read_config(path: Path, command: str) -> dict[str, Any]:
    """Return the flags that a sweep.yaml holds, checked as if they had been given.

    Raises:
        UsageError: The file cannot be read, or a key is no flag.
    """
    import yaml

    try:
        content = _parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} holds no flags: it has to be a mapping, as in 'datasets: [PACS]'")
    arguments = [command]
    for name, value in content.items():
        if name == "hparams" and isinstance(value, dict):
            value = json.dumps(value, default=str)
        if isinstance(value, dict):
            value = [f"{key}={item}" for key, item in value.items() if item is not False and item is not None]
        if value is False or value is None:
            continue
        items = [] if value is True else value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, items)]
    try:
        return vars(build_parser().parse_args(arguments))
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from error


def _parse_yaml(text: str) -> Any:
    """Parse YAML whose numbers are JSON's: to YAML 1.1, 1:30:00 is 5400 and 1e-3 a text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    numbers = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in numbers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    whole = r"-?(0|[1-9]\d*)"
    for tag, pattern in zip(numbers, (whole, rf"({whole}(\.\d*)?|-?\.\d+)([eE][-+]?\d+)?"), strict=False):
        Loader.add_implicit_resolver(tag, re.compile(f"{pattern}$"), list("-.0123456789"))
    return yaml.load(text, Loader)


def make_options(given: dict[str, Any]) -> Options:
    """Return what was given of the launch flags.

    Raises:
        UsageError: A Slurm option is not KEY=VALUE.
    """
    from daft_domainbed.launch.options import Options

    slurm = {}
    for text in given.get("slurm") or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"--slurm {text!r}: write KEY=VALUE, as in partition=gpu")
        slurm[key] = value
    names = {field.name for field in fields(Options)} - {"slurm", "threads"}  # the latter is the sweep's
    return Options(slurm=slurm, **{name: value for name, value in given.items() if name in names and value is not None})


def _make_absolute(name: str, value: Any) -> Any:
    """Return what names a place in such a way that a job finds it from the folder that its sweep was launched in."""
    if isinstance(value, list):
        return [_make_absolute(name, item) for item in value]
    if name == "data_dir":
        return os.path.abspath(os.path.expanduser(value))
    if name in ("ood", "strong_ood") and value.startswith("folder:"):
        return f"folder:{os.path.abspath(os.path.expanduser(value.removeprefix('folder:')))}"
    return value


def _check_launcher_flags(given: dict[str, Any], launcher: str) -> None:
    """Refuse flags of a launcher that is not the one, which would be ignored in silence; a file may hold several's."""
    for flag, owner in (("slurm", "slurm"), ("ray_address", "ray")):
        if flag in given and launcher != owner:
            raise UsageError(f"--{flag} is given, and the launcher is {launcher}: add --command_launcher {owner}")


def _check_asked_flags(given: dict[str, Any], command: str) -> None:
    """Refuse flags of another question, which would be ignored in silence; a file may hold several's."""
    for other, (_, own, _) in ASKED.items():
        if other != command and (stray := [name for name in own if name in given]):
            raise UsageError(f"--{stray[0]} is for 'sweep {other}', and this is 'sweep {command}': leave it out")


if __name__ == "__main__":
    sys.exit(run_command("sweep"))
