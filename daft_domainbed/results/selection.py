"""Model selection: DomainBed's three rules ("In Search of Lost Domain Generalization", Gulrajani & Lopez-Paz, 2021).

A rule looks at the runs of one data set, algorithm, held-out domain and trial, and chooses a run (its hyperparameters)
and a checkpoint. The number reported is that checkpoint's accuracy on the in-split of the held-out domain. Candidates
are the runs that the cell was asked for: those that hold out this domain alone, unless it was asked for with others.
Beside single domains, runs that hold out a pair serve leave-one-domain-out cross-validation, as validation and never as
a result.

Ties are broken as DomainBed breaks them: the earliest step of a run; of several runs the highest hparams_seed (it sorts
ascending by validation accuracy and reverses).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from daft_domainbed.results.asked import LEAVE_OUT, Held
from daft_domainbed.results.records import Run
from daft_domainbed.results.settings import Setting
from daft_domainbed.results.sweeps import Sweep

IN, OUT = 0, 1


class Choice(NamedTuple):
    """A chosen checkpoint: its place in its run, the accuracy that chose it and the one it is chosen for, fractions."""

    run: Run
    at: int
    val_acc: float
    test_acc: float

    @property
    def step(self) -> int:
        """Step of the checkpoint."""
        return int(self.run.steps[self.at])


class Group(NamedTuple):
    """Runs of one group compete for one trial's number in a cell of the table."""

    dataset: str
    kind: str
    algorithm: str
    setting: Setting
    source: int | None
    test_env: int
    held_out: Held
    trial_seed: int


def group_runs(sweep: Sweep) -> dict[Group, list[Run]]:
    """Group runs by the cell and the trial that they compete for; a pair may validate the runs of two groups.

    Which runs a cell shows is what the sweep was asked for (`asked.find_asked`).
    """
    groups: dict[Group, list[Run]] = {}
    for run in sweep.runs:
        dataset, algorithm, test_envs, trial_seed, _ = run.key
        for (source, env), held_out in sweep.asked[dataset, run.kind].cells.items():
            is_validation = len(held_out) == 1 and len(test_envs) == 2 and env in test_envs
            if test_envs == held_out or (is_validation and run.kind == LEAVE_OUT):
                group = Group(dataset, run.kind, algorithm, run.setting, source, env, held_out, trial_seed)
                groups.setdefault(group, []).append(run)
    return groups


def choose(selection: str, runs: Sequence[Run], test_env: int, held_out: Held | None = None) -> Choice | None:
    """Choose among the runs of a group; None where the rule has nothing to choose from.

    Args:
        selection: A key of SELECTIONS.
        runs: The runs of one group, pairs included.
        test_env: The domain of the cell.
        held_out: All domains that its runs hold out; `test_env` alone unless given.
    """
    held_out = (test_env,) if held_out is None else held_out
    candidates = [run for run in runs if run.key.test_envs == held_out and run.n_envs > len(held_out)]
    choices = (
        SELECTIONS[selection](run, runs, test_env) for run in sorted(candidates, key=lambda run: -run.key.hparams_seed)
    )
    return max((choice for choice in choices if choice), key=lambda choice: choice.val_acc, default=None)


def choose_by_training_domains(run: Run, runs: Sequence[Run], test_env: int) -> Choice:
    """Training-domain validation: the checkpoint with the best mean out-split accuracy over the training domains."""
    val_accs = np.delete(run.accs[:, :, OUT], run.key.test_envs, axis=1).mean(axis=1)
    return _take(run, int(val_accs.argmax()), val_accs, test_env)


def choose_by_oracle(run: Run, runs: Sequence[Run], test_env: int) -> Choice:
    """Test-domain validation (oracle): the last checkpoint, valued by its out-split accuracy on the held-out domain."""
    return _take(run, -1, run.accs[:, test_env, OUT], test_env)


def choose_by_left_out_domains(run: Run, runs: Sequence[Run], test_env: int) -> Choice | None:
    """Leave-one-domain-out cross-validation over the training domains, step by step.

    The value of a step is the mean, over the training domains, of the accuracy on a domain's in-split of the run (same
    hyperparameters, same step) that had it held out beside the test domain. Steps that a pair lacks are no candidates.
    """
    if run.key.test_envs != (test_env,):
        return None
    pairs = {
        next(env for env in other.key.test_envs if env != test_env): other
        for other in runs
        if len(other.key.test_envs) == 2 and other.key.hparams_seed == run.key.hparams_seed
    }
    train_envs = [env for env in range(run.n_envs) if env != test_env]
    if not pairs.keys() >= set(train_envs):
        return None
    shared = sorted(set(run.steps.tolist()).intersection(*(pairs[env].steps.tolist() for env in train_envs)))
    if not shared:
        return None
    accs = [pairs[env].accs[np.searchsorted(pairs[env].steps, shared), env, IN] for env in train_envs]
    val_accs = np.full(len(run.steps), -np.inf)
    val_accs[np.searchsorted(run.steps, shared)] = np.stack(accs, axis=1).mean(axis=1)
    return _take(run, int(val_accs.argmax()), val_accs, test_env)


def _take(run: Run, index: int, val_accs: np.ndarray, test_env: int) -> Choice:
    index %= len(run.steps)
    return Choice(run, index, float(val_accs[index]), float(run.accs[index, test_env, IN]))


SELECTIONS: dict[str, Callable[[Run, Sequence[Run], int], Choice | None]] = {
    "training-domain": choose_by_training_domains,
    "leave-one-domain-out": choose_by_left_out_domains,
    "oracle": choose_by_oracle,
}


class Words(NamedTuple):
    """A selection in words: its name and what it chooses."""

    name: str
    rule: str


SELECTION_WORDS = {
    "training-domain": Words(
        "training-domain validation",
        "the checkpoint with the best mean out-split accuracy over the training domains",
    ),
    "leave-one-domain-out": Words(
        "leave-one-domain-out cross-validation",
        "the step and hyperparameters that do best on training domains left out in turn",
    ),
    "oracle": Words(
        "test-domain validation (oracle)",
        "the last checkpoint; hyperparameters by the out-split of the held-out domain itself, so not a fair comparison",
    ),
}
