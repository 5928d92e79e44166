"""The three selections: by hand, and against DomainBed's own classes on random sweeps."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from daft_domainbed.results.selection import SELECTIONS, choose, group_runs
from daft_domainbed.results.sweeps import read_sweep


def group(root):
    """Runs by data set, algorithm, held-out domain and trial."""
    groups = group_runs(read_sweep(root))
    return {(key.dataset, key.algorithm, key.test_env, key.trial_seed): runs for key, runs in groups.items()}


def choose_in(sweep, selection, test_env=0):
    return choose(selection, group(sweep.root)["Toy", "ERM", test_env, 0], test_env)


def test_training_domain_validation_takes_the_best_mean_of_training_out_splits(sweep):
    # out-splits of the training domains 1 and 2: (.5 + .7)/2 = .6, (.9 + .5)/2 = .7, (.6 + .6)/2 = .6
    accs = {
        0: [(0.91, 1.0), (0.0, 0.5), (0.0, 0.7)],
        10: [(0.42, 0.0), (0.0, 0.9), (0.0, 0.5)],
        20: [(0.93, 1.0), (1.0, 0.6), (1.0, 0.6)],
    }
    sweep.run("ERM", [0], accs)
    choice = choose_in(sweep, "training-domain")
    assert (choice.step, choice.test_acc) == (10, 0.42)
    assert choice.val_acc == pytest.approx(0.7)


def test_training_domain_validation_compares_hparams(sweep):
    sweep.run("ERM", [0], {0: [(0.1, 0.1), (0.5, 0.5), (0.5, 0.5)]}, hparams_seed=0)
    sweep.run("ERM", [0], {0: [(0.2, 0.2), (0.5, 0.7), (0.5, 0.7)]}, hparams_seed=1)
    sweep.run("ERM", [0], {0: [(0.9, 0.9), (0.5, 0.6), (0.5, 0.6)]}, hparams_seed=2)
    choice = choose_in(sweep, "training-domain")
    assert (choice.run.key.hparams_seed, choice.test_acc) == (1, 0.2)


def test_oracle_looks_at_the_last_step_only(sweep):
    # the best out-split on the held-out domain is at step 0 of run 0, but last steps compare .3 with .4
    sweep.run("ERM", [0], {0: [(0.9, 0.9), (0, 0), (0, 0)], 10: [(0.8, 0.3), (1, 1), (1, 1)]}, hparams_seed=0)
    sweep.run("ERM", [0], {0: [(0.1, 0.1), (0, 0), (0, 0)], 10: [(0.2, 0.4), (0, 0), (0, 0)]}, hparams_seed=1)
    choice = choose_in(sweep, "oracle")
    assert (choice.run.key.hparams_seed, choice.step, choice.val_acc, choice.test_acc) == (1, 10, 0.4, 0.2)


def test_leave_one_domain_out_joins_pairs_on_the_step(sweep):
    # held out: domain 0. Step 0: domain 1 in the run without {0, 1} .2, domain 2 in the run without {0, 2} .4: mean .3.
    # Step 10: .6 and .2: mean .4. Step 20 would be the best, but the run without {0, 2} lacks it.
    sweep.run("ERM", [0], {step: [(0.5 + step / 100, 0), (1, 1), (1, 1)] for step in (0, 10, 20)})
    sweep.run("ERM", [0, 1], {0: [(1, 1), (0.2, 1), (1, 1)], 10: [(1, 1), (0.6, 0), (0, 0)], 20: [(1, 1)] * 3})
    sweep.run("ERM", [0, 2], {0: [(1, 1), (1, 1), (0.4, 1)], 10: [(1, 1), (1, 1), (0.2, 0)]})
    choice = choose_in(sweep, "leave-one-domain-out")
    assert (choice.step, choice.test_acc) == (10, 0.6)
    assert choice.val_acc == pytest.approx(0.4)
    assert ("Toy", "ERM", 1, 0) not in group(sweep.root)  # no run holds out 1 alone


@pytest.mark.parametrize("lacking", ["a pair", "its hparams_seed", "a shared step"])
def test_leave_one_domain_out_chooses_nothing_without_all_pairs(sweep, lacking):
    sweep.run("ERM", [0], {0: [(0.5, 0.5)] * 3})
    sweep.run("ERM", [0, 1], {0: [(0.5, 0.5)] * 3})
    if lacking != "a pair":
        other = {"hparams_seed": 1} if lacking == "its hparams_seed" else {}
        sweep.run("ERM", [0, 2], {5 if lacking == "a shared step" else 0: [(0.5, 0.5)] * 3}, **other)
    assert choose_in(sweep, "leave-one-domain-out") is None


def test_pairs_are_no_candidates(sweep):
    sweep.run("ERM", [0, 1], {0: [(1.0, 1.0)] * 3})
    assert choose_in(sweep, "training-domain") is None
    assert choose_in(sweep, "oracle") is None


def test_ties_go_to_the_earliest_step_and_the_highest_hparams_seed(sweep):
    for seed in (0, 1):
        accs = {step: [(0.1 * seed + step / 100, 0.5), (0.5, 0.5), (0.5, 0.5)] for step in (0, 10)}
        sweep.run("ERM", [0], accs, hparams_seed=seed)
    assert choose_in(sweep, "training-domain")[1:] == (0, 0.5, 0.1)
    assert choose_in(sweep, "oracle")[1:] == (1, 0.5, 0.2)


def make_random_sweep(sweep, seed: int, n_envs: int) -> None:
    """Coarse accuracies, so that ties are common; gaps in the schedule, runs and pairs missing at random."""
    draw = random.Random(seed)
    every = [(e,) for e in range(n_envs)] + [(e, f) for e in range(n_envs) for f in range(e)]
    for algorithm in ("ERM", "DAFT"):
        for trial in range(2):
            for hparams_seed in range(3):
                for test_envs in every:
                    if draw.random() < 0.05:
                        continue
                    steps = [step for step in (0, 10, 20, 30) if draw.random() < 0.9]
                    accs = {s: [(draw.randint(0, 5) / 5, draw.randint(0, 5) / 5) for _ in range(n_envs)] for s in steps}
                    seeds = {"trial_seed": trial, "hparams_seed": hparams_seed}
                    sweep.run(algorithm, test_envs, accs, **seeds) if accs else None


@pytest.mark.parametrize(("seed", "n_envs"), [(0, 3), (1, 3), (2, 4), (3, 4), (4, 2), (5, 10)])
def test_equals_domainbed_on_random_sweeps(sweep, upstream, seed, n_envs):
    from domainbed import model_selection
    from domainbed.lib import reporting

    make_random_sweep(sweep, seed, n_envs)
    theirs = {
        "training-domain": model_selection.IIDAccuracySelectionMethod,
        "leave-one-domain-out": model_selection.LeaveOneOutSelectionMethod,
        "oracle": model_selection.OracleSelectionMethod,
    }
    groups = group(sweep.root)
    expected = reporting.get_grouped_records(reporting.load_records(str(sweep.root)))
    assert len(groups) == len(expected) > 0
    n_chosen = 0
    for found in expected:
        key = tuple(found[name] for name in ("dataset", "algorithm", "test_env", "trial_seed"))
        for selection in SELECTIONS:
            choice = choose(selection, groups[key], found["test_env"])
            n_chosen += choice is not None
            # to the last bit
            assert (choice and choice.test_acc) == theirs[selection].sweep_acc(found["records"]), (key, selection)
    assert n_chosen > len(groups)


def test_equals_domainbed_on_the_sweep_it_ships(upstream):
    """The clone's own example sweep (VLCS, ERM, pairs, two trials) and the table printed from it."""
    root = upstream / "domainbed" / "misc"
    groups = group(root / "test_sweep_data")
    printed = [line for line in (root / "test_sweep_results.txt").read_text().splitlines() if "+/-" in line]
    for selection, line in zip(SELECTIONS, printed[::2], strict=True):
        cells = []
        for env in range(4):
            chosen = (choose(selection, groups["VLCS", "ERM", env, trial], env) for trial in (0, 1))
            accs = [100 * choice.test_acc for choice in chosen if choice]
            cells.append(f"{np.mean(accs):.1f} +/- {np.std(accs) / math.sqrt(len(accs)):.1f}")
        assert line.split("  ")[0] == "ERM"
        assert [cell.strip() for cell in line.split("   ") if "+/-" in cell] == cells


def test_environments_are_averaged_in_numpys_order(sweep):
    """With ten domains the order of a sum shows in its last bit, and a tie may hang on it."""
    draw = random.Random(0)
    accs = {step: [(0.5, draw.random()) for _ in range(10)] for step in range(8)}
    sweep.run("ERM", [3], accs)
    (run,) = read_sweep(sweep.root).runs
    means = [np.mean([pair[1] for env, pair in enumerate(accs[step]) if env != 3]) for step in accs]
    assert choose("training-domain", [run], 3).val_acc == max(means)
    assert json.dumps(max(means)) == json.dumps(choose("training-domain", [run], 3).val_acc)
