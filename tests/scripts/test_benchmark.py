"""The benchmark measures what it says: its loops compute what the engine computes, its table is made of its values."""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.benchmark import bare, inputs, workers
from daft_domainbed.benchmark.cases import CASES
from daft_domainbed.benchmark.growth import count_jobs
from daft_domainbed.benchmark.measure import Case, Goal, Rounds, make_row, take_turns
from daft_domainbed.benchmark.place import copy_clone
from daft_domainbed.benchmark.shares import profile_jobs
from daft_domainbed.benchmark.sizes import RECORDS_PER_FOLDER, SIZES
from daft_domainbed.benchmark.stopwatch import PHASES, Stopwatch
from daft_domainbed.benchmark.workers import Bench
from daft_domainbed.cli import run_command
from daft_domainbed.data.loaders import make_eval_stream
from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.functional.attacks import run_pgd
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.host import checkpoints, contract
from daft_domainbed.results.sweeps import read_sweep
from daft_domainbed.training.prepare import prepare
from tests.processes import WarmPopen

ROWS = [
    *("small_job", "many_jobs", "digits", "digits_fast", "daft_step", "aft_features", "aft_pixels"),
    *("pretrained_step", "folder", "folder_cached", "evaluation", "resume_file", "collect_results", "demo"),
]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, SIZES["tiny"], threads=1, clone=None)


@pytest.fixture
def warm_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares what is measured the import of torch."""
    monkeypatch.setattr(workers, "Popen", WarmPopen)


@pytest.fixture
def without_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOMAINBED_ROOT", raising=False)


# --- the command ----------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("benchmark", ["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert list(dict.fromkeys(names)) == list(CASES) == ROWS
    assert all(case.about.endswith(".") and case.goals and case.bare for case in CASES.values())


def test_unknown_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("benchmark", ["--only", "smal_job"]) == 2
    err = capsys.readouterr().err
    assert "--only: no row 'smal_job'. Did you mean 'small_job'? The rows are small_job, many_jobs" in err


@pytest.mark.usefixtures("without_clone", "warm_processes")
def test_row_that_fails_does_not_keep_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(bench: Bench) -> Rounds:
        yield {"ours": lambda: {"step": bench.call("inputs:lost")}}

    def do(bench: Bench) -> Rounds:
        yield {"ours": lambda: {"step": 1.0}}

    for name, rounds in (("small_job", fail), ("many_jobs", do)):
        monkeypatch.setitem(CASES, name, Case(name, "about", "bare", (Goal("step", "s", None, 2),), rounds))
    assert run_command("benchmark", ["--only", "small_job", "many_jobs", "--format", "json"]) == 1
    captured = capsys.readouterr()
    failed, done = json.loads(captured.out)["rows"]
    assert (failed["ours"], failed["met"], failed["n"]) == (None, None, 0)
    assert "AttributeError" in failed["error"]
    assert (done["ours"], done["met"], done["error"]) == (1, True, None)
    assert "row small_job could not be measured: inputs:lost failed while it was measured" in captured.err


@pytest.mark.usefixtures("warm_processes")
def test_signal_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = []

    def rounds(bench: Bench) -> Rounds:
        (bench.scratch / "file").touch()
        with bench.pace("bare:answer", backbone="resnet8_w2", batch=1) as worker:
            processes.append(worker.process)
            os.kill(os.getpid(), signal.SIGTERM)
            yield {}

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(CASES, "evaluation", replace(CASES["evaluation"], rounds=rounds))
    assert run_command("benchmark", ["--only", "evaluation", "--scale", "tiny"]) == 143
    (process,) = processes
    assert process.poll() is not None
    assert capsys.readouterr() == ("", "daft-domainbed benchmark: stopped; nothing was measured to the end\n")
    assert list(tmp_path.iterdir()) == []


def test_a_choice_of_rows_is_refused_where_there_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("benchmark", ["--only", "small_job", "--profile"]) == 2
    assert "--only chooses rows, and --profile and --growth have none: leave it out" in capsys.readouterr().err
    assert run_command("benchmark", ["--growth", "--profile"]) == 2
    assert "--profile" in capsys.readouterr().err


def test_list_imports_nothing_heavy() -> None:
    code = "import sys; from daft_domainbed.scripts.benchmark import main; main(['--list']); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "json" in modules and "torch" not in modules


MEASURED = ["small_job", "daft_step", "resume_file", "collect_results"]


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What the command prints where it measures some of the rows, once each."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(workers, "Popen", WarmPopen)
        patch.delenv("DOMAINBED_ROOT", raising=False)
        argv = ["--scale", "tiny", "--threads", "1", "--repeat", "1", "--only", *MEASURED]
        assert run_command("benchmark", argv) == 0
    return out.getvalue().splitlines()


def test_table_then_json(printed: list[str]) -> None:
    *table, last = printed
    content = json.loads(last)
    assert "no column of the host: DOMAINBED_ROOT is not set to a clone of DomainBed" in table
    goals = [name for name in MEASURED for _ in CASES[name].goals]
    header = next(i for i, line in enumerate(table) if line.startswith("name"))
    assert [line.split()[0] for line in table[header + 1 : header + 1 + len(goals)]] == goals
    assert content.keys() == {"schema", "machine", "scale", "repeat", "rows"}
    assert content["machine"]["threads"] == 1
    assert content["machine"].keys() > {"cpu", "torch", "python", "commit", "host_commit", "cores_usable", "load"}
    assert [row["name"] for row in content["rows"]] == goals


@pytest.mark.parametrize("name", MEASURED)
def test_row_can_be_measured(printed: list[str], name: str) -> None:
    rows = [row for row in json.loads(printed[-1])["rows"] if row["name"] == name]
    assert [row["metric"] for row in rows] == [goal.metric for goal in CASES[name].goals]
    for row in rows:
        check_row(row, n=1)
        assert row["error"] is row["host"] is None and row["values"]["host"] == []
        assert (row["bare"] is None) == (name == "resume_file")


def check_row(row: dict[str, Any], n: int) -> None:
    assert row["ours"] > 0 and row["n"] == n
    for column, values in row["values"].items():
        assert (row[column] is None) == (not values)
        assert all(value > 0 and math.isfinite(value) for value in values)
    if row["against"] and row[row["against"]]:
        assert row["ratio"] == row["ours"] / row[row["against"]]
        assert (row["met"] is None) == (row["goal"] == "reported")


class Rehearsal(Bench):
    """Runs nothing: makes sure that what would be run exists and takes what it is given."""

    def time(self, module: str, *args: object, with_host: bool = False) -> float:
        assert with_host == module.startswith("domainbed.")
        script = import_module(module) if not with_host and hasattr(import_module(module), "build_parser") else None
        values = list(map(str, args))
        if script:
            script.build_parser().parse_args(values)
        if "--output_dir" in values:
            folder = Path(values[values.index("--output_dir") + 1])
            for job in ("", "a", "b", "c"):
                (folder / job).mkdir(exist_ok=True)
                (folder / job / "done").touch()
            (folder / "results.jsonl").write_text('{"step": 0, "step_time": 1.0}\n')
        return 1.0

    def watch(self, module: str, *args: object, with_host: bool = False) -> dict[str, float]:
        return {"memory": self.time(module, *args, with_host=with_host), "processes": 1}

    def call(self, function: str, *, with_host: bool = False, **kwargs: Any) -> float:
        module, _, name = function.partition(":")
        assert with_host == (module == "host")
        inspect.signature(getattr(import_module(f"daft_domainbed.benchmark.{module}"), name)).bind(**kwargs)
        given = {field: kwargs[field] for field in TrainArgs.__dataclass_fields__ if field in kwargs}
        if "hparams" in given and "algorithm" in given:
            prepare(TrainArgs(**given))
        return 1.0

    @contextmanager
    def pace(self, function: str, *, with_host: bool = False, **kwargs: Any) -> Iterator[Any]:
        self.call(function, with_host=with_host, **kwargs, on_step=print)
        yield SimpleNamespace(advance=lambda n: [1.0] * n, take_median=lambda n: 1.0)


@pytest.mark.parametrize("has_clone", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_rows_ask_for_what_there_is(name: str, has_clone: bool, tmp_path: Path) -> None:
    bench = Rehearsal(tmp_path, SIZES["tiny"], threads=1, clone=tmp_path if has_clone else None)
    values = take_turns(CASES[name].rounds(bench), repeat=2)
    has_host = {"small_job", "many_jobs", "digits", "folder", "folder_cached", "collect_results"}
    for goal in CASES[name].goals:
        row = make_row(CASES[name], goal, values[goal.metric])
        check_row(row, n=2)
        assert (row["host"] is not None) == (has_clone and name in has_host)
        assert (row["bare"] is None) == (name == "resume_file")


@pytest.mark.slow
@pytest.mark.skipif("DOMAINBED_ROOT" not in os.environ, reason="no clone of DomainBed to compare with")
@pytest.mark.parametrize("name", ["folder", "collect_results"])
def test_column_of_the_host(name: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, SIZES["tiny"], threads=1, clone=copy_clone(tmp_path))
    values = take_turns(CASES[name].rounds(bench), repeat=1)
    row = make_row(CASES[name], CASES[name].goals[0], values["rate"])
    check_row(row, n=1)
    assert row["host"] > 0


def test_folder_that_is_no_clone_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOMAINBED_ROOT", str(tmp_path))
    with pytest.raises(UsageError, match="which is no clone of DomainBed"):
        copy_clone(tmp_path / "scratch")


# --- bare loops -----------------------------------------------------------------------------------------------------


class Recorder:
    """What an ERM was given, from which weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.start: list[Tensor] = []
        self.losses: list[float] = []
        erm = contract.find_host().algorithms.ERM
        update = erm.update

        def record(algorithm: Any, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
            if not self.start:
                self.start = [value.clone() for value in algorithm.network.state_dict().values()]
            self.batches.append(tuple(torch.cat(parts) for parts in zip(*minibatches, strict=True)))  # type: ignore[arg-type]
            values: dict[str, float] = update(algorithm, minibatches, unlabeled)
            self.losses.append(values["loss"])
            return values

        monkeypatch.setattr(erm, "update", record)


def load_in_order(network: nn.Module, values: list[Tensor]) -> None:
    names = network.state_dict().keys()
    network.load_state_dict(dict(zip(names, values, strict=True)))


@pytest.mark.parametrize("dataset", ["Debug28", "RotatedMNIST"])
def test_bare_steps_are_the_engines(dataset: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = inputs.write_digits(tmp_path / "digits", 120)
    recorder = Recorder(monkeypatch)
    flags = {"dataset": dataset, "data_dir": str(root), "steps": 3, "checkpoint_freq": 3}
    content = checkpoints.load_checkpoint(tiny.train("run", {"backbone": "default"}, **flags) / "model.pkl")

    channels, classes = (3, 2) if dataset == "Debug28" else (1, 10)
    network = bare.DigitsNetwork(channels, classes)
    load_in_order(network, recorder.start)
    losses = bare.train(network, recorder.batches)

    assert losses == recorder.losses and len(losses) == 3
    theirs = [value for name, value in content["model_dict"].items() if name.startswith("network.")]
    assert all(torch.equal(*pair) for pair in zip(network.state_dict().values(), theirs, strict=True))
    assert not torch.equal(theirs[0], recorder.start[0])


def test_bare_evaluation_is_the_hosts() -> None:
    misc = contract.find_host().misc
    torch.manual_seed(0)
    network, images, labels = bare.DigitsNetwork(3, 2), torch.randn(150, 3, 28, 28), torch.randint(2, (150,))
    network.predict = network.forward  # type: ignore[assignment]
    split, _ = misc.split_dataset(torch.utils.data.TensorDataset(images, labels), 150)
    accuracy = misc.accuracy(network, make_eval_stream(split, 0), None, "cpu")
    assert bare.evaluate(network, images, labels) == accuracy
    assert 0 < accuracy < 1 and network.training


def test_bare_attack_is_ours() -> None:
    torch.manual_seed(0)
    network, x, y = bare.build_network("resnet8_w2").eval(), torch.rand(4, 3, 32, 32), torch.randint(8, (4,))

    def loss(inputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(network(inputs), y, reduction="sum")

    ours = run_pgd(loss, x, eps=4 / 255, norm="linf", steps=3, spec=INPUT_SPECS["unit"])
    theirs = bare.attack(network, x, y, 4 / 255, 3)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert not torch.allclose(x, theirs, atol=1e-3)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_bare_fine_tuning_needs_five_forward_passes_as_aft_does(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    forward = bare.build_network("resnet8_w2")[0].__class__.forward

    def count(network: nn.Module, x: Tensor) -> Tensor:
        passes.append("attack" if x.requires_grad else "plain")
        return forward(network, x)  # type: ignore[operator, no-any-return]

    def stop() -> None:
        raise InterruptedError

    teacher = tiny.make_teacher()
    monkeypatch.setattr(bare.build_network("resnet8_w2")[0].__class__, "forward", count)
    with pytest.raises(InterruptedError):
        bare.fine_tune("resnet8_w2", batch=4, attack_steps=3, on_step=stop)
    of_bare = list(passes)
    passes.clear()
    aft = contract.find_host().algorithms.AFT
    update = aft.update
    monkeypatch.setattr(aft, "update", lambda *args: passes.clear() or update(*args) | {"passes": len(passes)})
    hparams = {"aft_attack": "pixels", "aft_attack_steps": 3, "teacher": str(teacher)}
    run = tiny.train("aft", hparams, algorithm="AFT", steps=1)
    record = json.loads((run / "results.jsonl").read_text().splitlines()[0])
    assert of_bare == ["plain", "attack", "attack", "attack", "plain"]
    assert record["passes"] == len(of_bare)


def test_batches_are_of_every_domain() -> None:
    domains = [(torch.full((5, 1, 2, 2), i, dtype=torch.uint8), torch.full((5,), i)) for i in range(3)]
    for x, y in islice(bare.draw_batches(domains, 2), 3):
        assert y.tolist() == [0, 0, 1, 1, 2, 2]
        assert torch.equal(x[:, 0, 0, 0] * 255, y.float())


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_digits_are_read_alike(tmp_path: Path) -> None:
    root = inputs.write_digits(tmp_path, 70)
    images, labels = contract.find_host().datasets.RotatedMNIST.read_digits(
        object.__new__(contract.find_host().datasets.RotatedMNIST), str(root)
    )
    domains = bare.read_digits(str(root))
    assert torch.equal(images[::6].unsqueeze(1), domains[0][0])
    assert torch.equal(labels[1::6], domains[1][1])
    assert len(images) == 70 and len(set(labels.tolist())) == 10


def test_records_are_a_sweeps(tmp_path: Path) -> None:
    sweep = read_sweep(inputs.write_records(tmp_path, 30))
    assert len(sweep.runs) == 30
    assert {len(run.steps) for run in sweep.runs} == {RECORDS_PER_FOLDER}
    assert {(run.key.algorithm, run.key.hparams_seed) for run in sweep.runs} == {("ERM", 0)}
    assert all(run.is_done for run in sweep.runs)


# --- how it is measured ---------------------------------------------------------------------------------------------


def test_columns_take_turns_and_close_before_the_next_round() -> None:
    order: list[str] = []

    def rounds() -> Rounds:
        yield {"ours": lambda: {"x": order.append("ours") or 1.0}, "bare": lambda: {"x": order.append("bare") or 2.0}}
        order.append("closed")
        yield {"host": lambda: {"x": order.append("host") or 3.0, "y": 4.0}}

    values = take_turns(rounds(), repeat=2)
    assert order == ["ours", "bare", "bare", "ours", "closed", "host", "host"]
    assert values == {"x": {"ours": [1, 1], "bare": [2, 2], "host": [3, 3]}, "y": {"host": [4, 4]}}


@pytest.mark.parametrize(
    ("goal", "text", "ratio", "met"),
    [
        (Goal("t", "s", "host", 0.35), "<= 0.35 x host", 0.4, False),
        (Goal("t", "s", "host", 0.4), "<= 0.4 x host", 0.4, True),
        (Goal("t", "s", "bare", 1.5, at_least=True), ">= 1.5 x bare", None, None),
        (Goal("t", "images/s", None, 2, at_least=True), ">= 2 images/s", None, True),
        (Goal("t", "s", None, 1), "<= 1 s", None, False),
        (Goal("t", "s", "host"), "reported", 0.4, None),
        (Goal("t", "records/s", None, 100_000), "<= 100,000 records/s", None, True),
    ],
)
def test_row_has_medians_and_is_judged(goal: Goal, text: str, ratio: float | None, met: bool | None) -> None:
    case = Case("name", "about", "limit", (goal,), lambda bench: (one for one in ()))
    row = make_row(case, goal, {"ours": [9, 2, 1], "host": [5, 4, 100]})
    assert (row["ours"], row["host"], row["bare"], row["n"]) == (2, 5, None, 3)
    assert (row["goal"], row["ratio"], row["met"]) == (text, ratio, met)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="no /proc here")
def test_family_of_processes_is_watched(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(0.5)'])"
    monkeypatch.setattr(workers, "SECONDS_BETWEEN_LOOKS", 0.02)
    alone = bench.watch("timeit", "-n1", "-r1", "import time; time.sleep(0.1)")
    two = bench.watch("timeit", "-n1", "-r1", sleep)
    assert (alone["processes"], two["processes"]) == (1, 2)
    assert 2 < alone["memory"] < 100


def test_what_fails_is_named(bench: Bench) -> None:
    with pytest.raises(RunError, match=r"daft_domainbed\.lost failed while it was measured: .*No module named"):
        bench.time("daft_domainbed.lost")
    with pytest.raises(RunError, match="inputs:lost failed while it was measured: AttributeError"):
        bench.call("inputs:lost")


@pytest.mark.usefixtures("warm_processes")
def test_loop_advances_when_it_is_told_to(bench: Bench) -> None:
    with bench.pace("bare:answer", backbone="resnet8_w2", batch=1) as worker:
        assert [len(worker.advance(n)) for n in (1, 3)] == [1, 3]
        assert worker.take_median(3) > 0
        process = worker.process
    assert process.returncode is not None


# --- shares and growth ----------------------------------------------------------------------------------------------


class Work:
    def outer(self) -> int:
        return sum(self)

    def __iter__(self) -> Iterator[int]:
        yield from (1, 2)


def test_seconds_belong_to_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("daft_domainbed.benchmark.stopwatch.time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    for name, phase in (("outer", "evaluation"), ("__iter__", "data")):
        monkeypatch.setattr(Work, name, getattr(Work, name))
        watch.attribute(Work, name, phase)
    assert Work().outer() == 3
    # Enter, make the iterator, three draws of which the last finds the end: a tick each way.
    assert watch.seconds == {"evaluation": 5, "data": 4}
    shares = watch.divide(10)
    assert list(shares) == ["seconds", *PHASES]
    assert sum(shares[phase] for phase in PHASES) == pytest.approx(100)
    assert shares["rest"] == pytest.approx(10)


@pytest.mark.usefixtures("warm_processes")
def test_time_of_three_jobs_is_divided(bench: Bench) -> None:
    (table,) = profile_jobs(replace(bench, size=replace(bench.size, images=1)), repeat=1)
    assert [row["of"] for row in table["rows"]] == ["ours"] * 3
    for row in table["rows"]:
        assert sum(row[phase] for phase in PHASES) == pytest.approx(100)
        assert all(row[phase] > 0 for phase in PHASES)


def test_jobs_are_counted(tiny: Any) -> None:
    counted = count_jobs(draws=1)
    # Ten sets of test domains, three trials, three algorithms; KD and DAFT share the ERM teacher of each.
    assert (counted["student"], counted["erm_teacher"], counted["aft_teacher"]) == (90, 30, 30)
    assert counted["taught_per_teacher"] == 1
