from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.data.loaders import make_eval_stream
from daft_domainbed.data.splits import build_data
from daft_domainbed.errors import UsageError
from daft_domainbed.host.checkpoints import build_model
from daft_domainbed.host.contract import find_host
from daft_domainbed.models.weights import load
from daft_domainbed.plugin.defaults import refuse_engine_hparams
from daft_domainbed.results.comparison import compare
from daft_domainbed.results.sweeps import read_sweep
from daft_domainbed.results.tables import build_results
from daft_domainbed.runtime import stopping
from daft_domainbed.runtime.randomness import seed_everything
from daft_domainbed.scripts import collect_results
from daft_domainbed.scripts import host as host_command
from daft_domainbed.testing.workbench import stop_after
from daft_domainbed.training import engine
from daft_domainbed.training.averaging import WeightAverage
from daft_domainbed.training.schedule import Schedule

TIMES = {"step_time", "seconds", "mem_gb", "started", "machine", "args"}


def read_records(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def read_model(folder: Path, name: str = "model.pkl") -> dict[str, Tensor]:
    return load(folder / name)["model_dict"]


@pytest.mark.parametrize("start", [0, 3])
def test_the_average_is_smas(tiny: Any, start: int) -> None:
    sma = read_model(tiny.train("sma", {"sma_start": start}, algorithm="SMA"))
    run = tiny.train("erm", {"average_start": start})
    averaged, plain = read_model(run, "model_averaged.pkl"), read_model(run)
    theirs = {name.removeprefix("averaged.module."): value for name, value in sma.items() if "averaged.module" in name}
    assert theirs
    for name, value in theirs.items():
        assert torch.equal(averaged[f"network.{name}"], value), name
    assert any(not torch.equal(averaged[name], plain[name]) for name in plain)


def test_who_asks_for_an_average_trains_as_before(tiny: Any) -> None:
    plain, asked = tiny.train("plain"), tiny.train("asked", {"average_start": 2})
    assert all(torch.equal(value, read_model(asked)[name]) for name, value in read_model(plain).items())
    for one, other in zip(read_records(plain), read_records(asked), strict=True):
        assert one | {"hparams": 0} == {k: v for k, v in other.items() if not k.startswith("averaged")} | {"hparams": 0}
        accuracies = {key for key in one if key.endswith("_acc")}
        assert {key for key in other if key.startswith("averaged")} == {f"averaged_{key}" for key in accuracies}
    first = read_records(asked)[0]
    assert all(
        first[f"averaged_{key}"] == first[key] for key in first if key.startswith("env") and key.endswith("_acc")
    )


def test_the_averaged_accuracies_are_those_of_the_averaged_model(tiny: Any) -> None:
    run = tiny.train("run", {"average_start": 1, "lr": 0.05}, steps=8)
    record, host, path = read_records(run)[-1], find_host("embedded"), run / "model_averaged.pkl"
    content = load(path)
    model = build_model(content, path, host)
    args = TrainArgs(**content["args"])
    seed_everything(args.seed)
    data = build_data(host, args, content["model_hparams"], host.datasets.get_dataset_class(args.dataset))
    for i, (split, _) in enumerate(data.list_splits()):
        accuracy = host.misc.accuracy(model, make_eval_stream(split, 0), None, torch.device("cpu"))
        assert accuracy == record[f"averaged_env{i}_in_acc"]


def test_a_mean_by_hand() -> None:
    algorithm = nn.Linear(2, 1)
    average = WeightAverage(2, torch.device("cpu"))
    for step, value in enumerate((9.0, 1.0, 2.0, 6.0), 1):
        nn.init.constant_(algorithm.weight, value)
        average.update(algorithm, step)
    with average.standing_in(algorithm):
        assert algorithm.weight.tolist() == [[3.0, 3.0]]
    assert algorithm.weight.tolist() == [[6.0, 6.0]]


@pytest.mark.parametrize("hparams", [{"average_start": 2, "lr_schedule": "cosine"}, {"probe_steps": 4}])
def test_an_interrupted_run_goes_on(tiny: Any, hparams: dict[str, Any]) -> None:
    whole = tiny.train("whole", hparams)
    for step in (2, 5):
        with pytest.raises(stopping.Stopped), stopping.listening():
            tiny.train("broken", hparams, on_step=stop_after(step))
    broken = tiny.train("broken", hparams)
    for name in ("model.pkl", *(["model_averaged.pkl"] if "average_start" in hparams else [])):
        assert all(torch.equal(value, read_model(broken, name)[key]) for key, value in read_model(whole, name).items())
    assert read_records(broken) == read_records(whole)


def test_what_never_comes_is_refused(tiny: Any) -> None:
    with pytest.raises(UsageError, match="average_start is 6: it must be below the 6 steps"):
        tiny.train(hparams={"average_start": 6})


def test_the_cosine_starts_at_the_rate_and_ends_before_nothing() -> None:
    class Algorithm:
        optimizer = None

    algorithm = Algorithm()
    algorithm.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = Schedule("cosine", 4, algorithm)
    rates = []
    for step in range(4):
        schedule.apply(algorithm, step)
        rates.append(algorithm.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.4267767, 0.25, 0.0732233])
    algorithm.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # as IRM does
    schedule.apply(algorithm, 2)
    assert algorithm.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_probe_trains_the_head_alone_and_then_the_rest(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = read_model(tiny.train("start", {"lr": 1e-30}, steps=1))
    probe = read_model(tiny.train("probe", {"backbone_frozen": True}, steps=3))
    held = read_model(tiny.train("held", {"probe_steps": 3, "lr_schedule": "constant"}, steps=4, checkpoint_freq=1))
    assert torch.equal(probe["network.0.conv.weight"], start["network.0.conv.weight"])
    assert not torch.equal(held["network.0.conv.weight"], start["network.0.conv.weight"])

    weights: list[dict[str, Tensor]] = []
    runs: list[Any] = []
    build = engine._Run._build_algorithm
    monkeypatch.setattr(engine._Run, "_build_algorithm", lambda run: (runs.append(run), build(run))[1])

    def keep(step: int, n_steps: int) -> None:
        weights.append({name: value.clone() for name, value in runs[0].algorithm.state_dict().items()})

    tiny.train("watched", {"probe_steps": 3}, steps=4, on_step=keep)
    assert all(torch.equal(value, probe[name]) for name, value in weights[2].items())


@pytest.mark.parametrize("name", ["n_views", "lr_schedule", "average_start", "probe_steps"])
def test_upstreams_own_loop_is_told_by_name_that_it_has_none(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is of this package's loop.*--host upstream"):
        refuse_engine_hparams({"lr": 0.1, name: 1})


def test_the_host_command_refuses_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("DOMAINBED_ROOT"):
        pytest.skip("needs a clone of DomainBed: set DOMAINBED_ROOT")
    monkeypatch.setattr("runpy.run_module", pytest.fail)
    with pytest.raises(UsageError, match="lr_schedule is of this package's loop"):
        host_command.main(["domainbed.scripts.train", "--dataset", "Debug28", "--hparams", '{"lr_schedule": "cosine"}'])


class TestCollecting:
    def make(self, tiny: Any) -> Path:
        for trial in (0, 1):
            for algorithm in ("ERM", "SMA"):
                hparams = {"average_start": 1, "lr": 0.05}
                tiny.train(f"sweep/{algorithm}{trial}", hparams, algorithm=algorithm, trial_seed=trial, test_envs=[0])
        return tiny.root / "sweep"

    def test_averaged_weights_are_chosen_and_compared(self, tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
        root = self.make(tiny)
        results = build_results(read_sweep(root, "averaged"))
        (row, *_), env = results.tables[0].rows, 0
        number = row.cells[env].numbers[0]
        record = [json.loads(line) for line in (root / "ERM0" / "results.jsonl").read_text().splitlines()][
            number.choice.at
        ]
        assert number.accuracy == 100 * record["averaged_env0_in_acc"]
        assert number.choice.val_acc == (record["averaged_env1_out_acc"] + record["averaged_env2_out_acc"]) / 2
        assert compare(results, "ERM", ["SMA"])[0].dataset == "Debug28"
        argv = ["--input_dir", str(root), "--weights", "averaged"]
        assert collect_results.main(argv) == 0
        assert collect_results.main([*argv, "--compare", "ERM", "SMA"]) == 0
        assert "ERM - SMA" in capsys.readouterr().out

    def test_a_run_without_them_is_left_out_and_named(self, tiny: Any) -> None:
        tiny.train("sweep/plain", test_envs=[0])
        with pytest.raises(UsageError, match="no averaged weights"):
            read_sweep(tiny.root / "sweep", "averaged")
