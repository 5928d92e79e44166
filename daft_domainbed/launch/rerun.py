"""From a search to more trials of what it chose: which settings, and the sweep that trains them anew."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from daft_domainbed.arguments import SweepArgs, TrainArgs
from daft_domainbed.errors import UsageError
from daft_domainbed.host.contract import describe_dataset, find_host
from daft_domainbed.hparams import parse_json, split_hparams
from daft_domainbed.launch.domains import find_set
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.plan_file import read_environments, read_jobs
from daft_domainbed.plugin.registration import register
from daft_domainbed.results.records import Run
from daft_domainbed.results.selection import choose
from daft_domainbed.results.sweeps import read_sweep
from daft_domainbed.training.prepare import choose_hparams

SELECTION = "training-domain"
HOW = ("per-algorithm", "per-environment")


@dataclass(frozen=True)
class Setting:
    """Hyperparameters that a search chose for the students of an algorithm.

    Attributes:
        dataset: As given to `--datasets`.
        algorithm: The students'.
        test_env: The held-out domain that they were chosen for; None is every one.
        trial_seed: Of the draw; None where the defaults were chosen, which every trial has.
        hparams_seed: Number of the draw; 0 is the defaults.
        validation: Mean accuracy, a fraction, on the out-splits of the training domains, at the best checkpoints.
        hparams: The values in which the draw differs from the defaults.
    """

    dataset: str
    algorithm: str
    test_env: int | None
    trial_seed: int | None
    hparams_seed: int
    validation: float
    hparams: dict[str, Any]

    def describe(self) -> str:
        """Return the setting in words."""
        where = "" if self.test_env is None else f", domain {self.test_env} held out"
        draw = f"draw {self.hparams_seed} of trial {self.trial_seed}" if self.hparams_seed else "the defaults"
        return f"{self.algorithm} on {self.dataset}{where}: {draw} (validation {100 * self.validation:.1f})"


def plan_rerun(search: SweepArgs, n_trials: int, how: str, output_dir: str) -> tuple[SweepArgs, list[Setting]]:
    """Return the sweep that trains what a search chose in trials that the search has not seen.

    Args:
        search: The arguments of the search, with its folder.
        n_trials: How many trials.
        how: "per-algorithm", one setting for all held-out domains, or "per-environment".
        output_dir: The new sweep's folder.

    Raises:
        UsageError: The search holds nothing to choose from, or its draws cannot be made again.
    """
    root = Path(search.output_dir)
    if os.path.realpath(root) == os.path.realpath(output_dir):
        raise UsageError(f"--output_dir {output_dir} is the search itself: choose another folder")
    sets = [
        find_set(word, envs, name) for name, envs in read_environments(root).items() for word in search.test_envs or ()
    ]
    if search.single_source or any(len(envs) > 1 for envs in sets):
        raise UsageError(f"{root} holds out several domains at once: rerun chooses where single ones are held out")
    settings = choose_settings(search, how)
    chosen = {
        "from": os.path.relpath(root, output_dir),
        "choose": how,
        "selection": SELECTION,
        "settings": [vars(setting) for setting in settings],
    }
    sweep = replace(
        search,
        output_dir=output_dir,
        n_trials_from=search.n_trials,
        n_trials=search.n_trials + n_trials,
        n_hparams_from=0,
        n_hparams=1,
        single_test_envs=search.test_envs is None,
        chosen=chosen,
    )
    return sweep, settings


def choose_settings(search: SweepArgs, how: str) -> list[Setting]:
    """Choose among the draws of a search by training-domain validation.

    A draw is a number in a trial; the defaults are the same in every trial, and their validation is averaged. Of equal
    draws the one with the highest number wins, as in the tables.

    Raises:
        UsageError: Nothing is done of an algorithm, or a draw cannot be made again.
    """
    root = Path(search.output_dir)
    jobs = {job.folder: job for job in read_jobs(root)}
    runs = [run for run in read_sweep(root).runs if len(run.key.test_envs) == 1 and run.folder in jobs]
    settings = []
    for dataset in search.datasets:
        for algorithm in search.algorithms:
            own = [run for run in runs if (jobs[run.folder].args.dataset, run.key.algorithm) == (dataset, algorithm)]
            if not own:
                raise UsageError(f"{root} has no finished run of {algorithm} on {dataset} to choose from")
            envs = sorted({run.key.test_envs[0] for run in own})
            for group in [envs] if how == "per-algorithm" else [[env] for env in envs]:
                settings.append(_choose(root, own, group, None if how == "per-algorithm" else group[0], jobs))
    return settings


def _choose(root: Path, runs: list[Run], envs: list[int], test_env: int | None, jobs: Mapping[str, Job]) -> Setting:
    values: dict[tuple[int | None, int], dict[int, list[float]]] = {}
    for run in runs:
        key, (env,) = run.key, run.key.test_envs
        choice = choose(SELECTION, [run], env)
        if choice is not None:
            draw = (key.trial_seed if key.hparams_seed else None, key.hparams_seed)
            values.setdefault(draw, {}).setdefault(env, []).append(choice.val_acc)
    complete = {
        draw: fmean(fmean(by_env[env]) for env in envs) for draw, by_env in values.items() if by_env.keys() >= {*envs}
    }
    key = runs[0].key
    if not complete:
        raise UsageError(
            f"{root} has no draw of {key.algorithm} on {key.dataset} that is done for every held-out domain"
        )
    trial, number = max(complete, key=lambda draw: (complete[draw], draw[1], -(draw[0] or 0)))
    winner = next(run for run in runs if run.key.hparams_seed == number and trial in (None, run.key.trial_seed))
    args = jobs[winner.folder].args
    drawn = _draw_again(root, args, winner)
    return Setting(args.dataset, key.algorithm, test_env, trial, number, complete[trial, number], drawn)


def _draw_again(root: Path, args: TrainArgs, run: Run) -> dict[str, Any]:
    """Return the values in which a run's draw differs from the defaults, and those given for its algorithm alone.

    Raises:
        UsageError: They are not those that its records have.
    """
    user, own = split_hparams(parse_json(args.hparams), args.algorithm)
    if not args.hparams_seed:
        return own
    host = find_host(args.host)
    register(host)
    dataset = describe_dataset(host, args.dataset, user, args.data_path)
    drawn = choose_hparams(host, args, dataset, user | own)
    defaults = choose_hparams(host, replace(args, hparams_seed=0), dataset, user | own)
    values = {name: value for name, value in drawn.items() if value != defaults[name]}
    for name, value in values.items():  # what is a text may stand for a value that the method found for it
        if not isinstance(value, str) and run.hparams.get(name) != value:
            raise UsageError(
                f"{root / run.folder} was trained with {name} {run.hparams.get(name)}, and its draw is {value} in this "
                "version: give the values with --hparams '{\"" + args.algorithm + "\": {...}}' to sweep launch"
            )
    return own | values
