"""The draw behind each number is named, with the values that tell draws apart."""

from __future__ import annotations

from daft_domainbed.cli import run_command

ACCS = {10: [(0.5, 0.5)] * 3}


def test_draws_behind_the_numbers(sweep, capsys):
    for env in range(3):
        for draw in range(2):
            better = {10: [(0.5 + 0.1 * draw, 0.5 + 0.1 * draw * (env > 0))] * 3}
            sweep.run("ERM", [env], better, hparams={"lr": 0.001 / (1 + draw), "width": 8}, hparams_seed=draw)
    setting = {"dataset": "Toy", "algorithm": "ERM", "test_env": 1, "trial_seed": 0, "hparams_seed": 4}
    sweep.write_plan(chosen={"from": "../search", "settings": [setting | {"hparams": {"lr": 0.25}}]})
    assert run_command("collect_results", ["--input_dir", str(sweep.root), "--show_hparams"]) == 0
    printed = capsys.readouterr().out
    assert "Settings of the students:\n  ERM on green: draw 4 of trial 0 in ../search (lr 0.25)\n" in printed
    assert (
        "Toy: training-domain validation, draws behind the numbers\n"
        "  ERM on red: draw 1 in trial 0\n"
        "  ERM on green: draw 1 in trial 0\n"
        "  ERM on blue: draw 1 in trial 0\n"
        "    draw 1 in trial 0: lr 0.0005\n"
    ) in printed
    assert run_command("collect_results", ["--input_dir", str(sweep.root), "--show_hparams", "--format", "csv"]) == 2
    assert "--format json has the hyperparameters" in capsys.readouterr().err
