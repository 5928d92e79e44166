from __future__ import annotations

import errno
import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from daft_domainbed._version import __version__
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.host import checkpoints, contract
from daft_domainbed.host.contract import describe_dataset
from daft_domainbed.methods import list_stages
from daft_domainbed.models import weights
from daft_domainbed.plugin.defaults import get_random_hparams
from daft_domainbed.runtime.machine import describe_machine
from daft_domainbed.training.engine import train
from daft_domainbed.training.prepare import check_test_envs
from tests.conftest import Shelf
from tests.processes import WarmPopen, wait_until

RunTrain = Callable[[list[str]], tuple[int, list[str]]]
Records = Callable[[Path], list[dict[str, Any]]]
ACCURACIES = {f"env{i}_{part}_acc" for i in range(3) for part in ("in", "out")}
UPSTREAM_KEYS = {"step", "epoch", "step_time", "mem_gb", "loss", "hparams", "args", *ACCURACIES}
UPSTREAM_FLAGS = {
    *("algorithm", "checkpoint_freq", "data_dir", "dataset", "hparams", "hparams_seed", "holdout_fraction"),
    *("output_dir", "save_model_every_checkpoint", "seed", "skip_model_save", "steps", "task", "test_envs"),
    *("trial_seed", "uda_holdout_fraction"),
}
OUR_FLAGS = {
    "host",
    "device",
    "precision",
    "teachers_dir",
    "image_cache",
    "feature_cache",
    "data_seed",
    "leave_out_classes",
    "cap_batch_size",
    "data_id",
    "data_path",
    "log",
}
EVALUATIONS = ["env0_in", "env1_in", "env2_in", "env0_out", "env1_out", "env2_out"]


class Update(NamedTuple):
    """A call of the algorithm's update, and what came of it."""

    minibatches: Any
    unlabeled: Any
    values: dict[str, float]


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[Update]:
    """Every call of ERM's update."""
    kind = contract.find_host().algorithms.ERM
    update, calls = kind.update, []

    def watch(self: Any, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        values = update(self, minibatches, unlabeled)
        calls.append(Update(minibatches, unlabeled, values))
        return values

    monkeypatch.setattr(kind, "update", watch)
    return calls


def load_states(folder: Path) -> dict[str, str]:
    return {
        path.name: weights.hash_state(checkpoints.load_checkpoint(path)["model_dict"]) for path in folder.glob("*.pkl")
    }


class TestRecords:
    def test_keys_are_upstreams(self, tiny: Any, records: Records, shelf: Shelf) -> None:
        first, *middle, last = records(shelf.get())
        assert [record["step"] for record in [first, *middle, last]] == [0, 2, 4, 5]
        assert first.keys() == UPSTREAM_KEYS | {"environments", "machine", "started", "size"}
        assert all(record.keys() == UPSTREAM_KEYS for record in middle)
        assert last.keys() == UPSTREAM_KEYS | {"seconds"}
        assert first["args"].keys() == UPSTREAM_FLAGS | OUR_FLAGS == {field.name for field in fields(TrainArgs)}
        assert first["environments"] == ["0", "1", "2"]
        assert first["machine"]["daft_domainbed"] == __version__
        assert datetime.fromisoformat(first["started"]).utcoffset() == timedelta(0)
        versions = {"python", "torch", "torchvision", "numpy"}
        assert first["machine"].keys() >= versions | {"platform", "cpu", "threads", "device", "precision"}

    def test_other_losses_are_recorded_by_name(self, tiny: Any, records: Records, teachers: dict[str, Path]) -> None:
        run = tiny.train(algorithm="DAFT", hparams={"teacher": str(teachers["AFT"])})
        for record in records(run):
            assert record.keys() >= UPSTREAM_KEYS | {"task_loss", "kd_loss"}
            weight = record["hparams"]["kd_weight"]
            assert record["loss"] == pytest.approx((1 - weight) * record["task_loss"] + weight * record["kd_loss"])

    def test_a_loss_is_the_mean_since_the_last_record(self, tiny: Any, records: Records, updates: list[Update]) -> None:
        losses = [record["loss"] for record in records(tiny.train(steps=8, checkpoint_freq=3))]
        steps = [call.values["loss"] for call in updates]
        chunks = [steps[:1], steps[1:4], steps[4:7], steps[7:]]
        assert losses == pytest.approx([sum(chunk) / len(chunk) for chunk in chunks], rel=1e-12)

    def test_an_epoch_is_a_pass_over_the_smallest_in_split(self, tiny: Any, records: Records) -> None:
        run = tiny.train(hparams={"batch_size": 4}, holdout_fraction=0.5)
        assert [record["epoch"] for record in records(run)] == [step / (8 / 4) for step in (0, 2, 4, 5)]

    def test_accuracies_are_those_of_the_model_at_that_step(
        self, tiny: Any, records: Records, gather_facts: Callable[..., Any]
    ) -> None:
        facts = gather_facts()
        run = tiny.train("erm", save_model_every_checkpoint=True)
        for record in records(run):
            content = checkpoints.load_checkpoint(run / f"model_step{record['step']}.pkl")
            shape, hparams = content["model_input_shape"], content["model_hparams"]
            network = facts.host.algorithms.ERM(shape, 2, 2, hparams)
            network.load_state_dict(content["model_dict"])
            network.eval()
            for i, pair in enumerate(facts.splits):
                for part, split in zip(("in", "out"), pair, strict=True):
                    x, y = (torch.stack(list(map(torch.as_tensor, items))) for items in zip(*split, strict=True))
                    with torch.no_grad():
                        accuracy = (network.predict(x).argmax(1) == y).double().mean().item()
                    assert record[f"env{i}_{part}_acc"] == accuracy

    def test_times_and_memory(self, tiny: Any, records: Records, shelf: Shelf) -> None:
        all_records = records(shelf.get())
        assert all(0 < record["step_time"] < 60 for record in all_records)
        assert all(record["mem_gb"] == 0 for record in all_records)
        assert all_records[-1]["seconds"] >= 6 * min(record["step_time"] for record in all_records)

    def test_hparams_and_args_are_plain_and_complete(self, tiny: Any, records: Records) -> None:
        run = tiny.train(hparams_seed=3, test_envs=[2, 1], trial_seed=4, seed=5)
        for record in records(run):
            host = contract.find_host()
            seed = host.misc.seed_hash(3, 4)
            drawn = get_random_hparams(host, "ERM", describe_dataset(host, "Debug28", {}), seed)
            assert record["hparams"] == drawn | {"batch_size": 8, "backbone": "resnet8_w2"}
            assert record["args"]["test_envs"] == [2, 1]
            assert (record["args"]["hparams_seed"], record["args"]["trial_seed"], record["args"]["seed"]) == (3, 4, 5)
            assert json.loads(record["args"]["hparams"]) == {"batch_size": 8, "backbone": "resnet8_w2"}

    def test_the_data_sets_own_schedule(self, tiny: Any, monkeypatch: pytest.MonkeyPatch, records: Records) -> None:
        kind = contract.get_dataset_class(contract.find_host(), "Debug28")
        monkeypatch.setattr(kind, "N_STEPS", 4)
        monkeypatch.setattr(kind, "CHECKPOINT_FREQ", 3)
        assert [record["step"] for record in records(tiny.train(steps=None, checkpoint_freq=None))] == [0, 3]

    def test_equal_commands_have_equal_outcomes(self, tiny: Any, outcome: Callable[..., Any], shelf: Shelf) -> None:
        again, other = tiny.train("again"), tiny.train("other", seed=2)
        assert outcome(again) == outcome(shelf.get())
        assert outcome(again)["model.pkl"] != outcome(other)["model.pkl"]


class TestFiles:
    def test_a_finished_run_leaves_upstreams_files_and_the_best_model(self, tiny: Any, shelf: Shelf) -> None:
        run = shelf.get()
        assert {path.name for path in run.iterdir()} == {
            *("results.jsonl", "model.pkl", "model_best.pkl", "done", "out.txt", "err.txt")
        }
        assert (run / "done").read_text() == "done"
        out = (run / "out.txt").read_text().splitlines()
        assert out[0] == "Environment:"
        assert "\tdataset: Debug28" in out
        header = next(i for i, line in enumerate(out) if line.startswith("env0_in_acc"))
        assert len(out) == header + 5
        assert (run / "err.txt").read_text() == ""

    def test_rows_go_to_standard_output_too(self, tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
        train(TrainArgs(**tiny.make_flags()))
        captured = capsys.readouterr()
        assert captured.out == (tiny.root / "run" / "out.txt").read_text()
        assert captured.err == ""

    def test_the_checkpoint(self, tiny: Any, records: Records, gather_facts: Callable[..., Any]) -> None:
        described = gather_facts(test_envs=[1]).provenance
        run = tiny.train("erm", test_envs=[1])
        content = checkpoints.load_checkpoint(run / "model.pkl")
        last = records(run)[-1]
        assert content.keys() == {*checkpoints.CHECKPOINT_KINDS, "provenance", "step", "class_names"}
        assert content["args"] == last["args"]
        assert content["model_hparams"] == last["hparams"]
        assert content["model_input_shape"] == (3, 28, 28)
        assert content["model_num_classes"] == 2
        assert content["model_num_domains"] == 2
        assert content["provenance"] == described
        assert content["step"] == 5

    def test_a_student_is_an_erm(self, tiny: Any, teachers: dict[str, Path]) -> None:
        run = tiny.train(algorithm="DAFT", hparams={"teacher": str(teachers["AFT"])})
        content = checkpoints.load_checkpoint(run / "model.pkl")
        host = contract.find_host()
        network = host.algorithms.ERM(
            content["model_input_shape"], content["model_num_classes"], content["model_num_domains"],
            content["model_hparams"],
        )  # fmt: skip
        network.load_state_dict(content["model_dict"])

    @pytest.mark.parametrize(
        ("outs", "best"),
        [
            ([(0, 0.5, 0.5), (0, 0.9, 0.3), (0, 0.6, 0.5), (0, 0.1, 0.2)], 1),  # 0.5, 0.6, 0.55, 0.15
            ([(0, 0.5, 0.5), (0, 0.6, 0.4), (1, 0.5, 0.5), (1, 0.4, 0.6)], 0),  # the first of equals
            ([(0.9, 0.1, 0.1), (0.8, 0.2, 0.2), (0.7, 0.3, 0.3), (0.6, 0.4, 0.4)], 3),  # no matter who is held out
        ],
    )
    def test_the_best_model_is_the_choice_of_training_domains(
        self, tiny: Any, monkeypatch: pytest.MonkeyPatch, outs: list[tuple[float, ...]], best: int
    ) -> None:
        answers = iter([value for out in outs for value in (0.0, 0.0, 0.0, *out)])
        monkeypatch.setattr(contract.find_host().misc, "accuracy", lambda *args: next(answers))
        run = tiny.train(save_model_every_checkpoint=True)
        states = load_states(run)
        steps = [0, 2, 4, 5]
        assert states["model_best.pkl"] == states[f"model_step{steps[best]}.pkl"]
        assert states["model.pkl"] == states["model_step5.pkl"]
        assert checkpoints.load_checkpoint(run / "model_best.pkl")["step"] == steps[best]
        assert len(states) == 6
        assert len(set(states.values())) == 4

    def test_no_model_is_kept_where_none_is_wanted(self, tiny: Any) -> None:
        run = tiny.train(skip_model_save=True, save_model_every_checkpoint=True)
        assert not list(run.glob("*.pkl"))
        assert (run / "done").is_file()

    def test_what_a_killed_owner_left_half_written_goes(self, tiny: Any) -> None:
        (tiny.root / "run").mkdir()
        (tiny.root / "run" / ".model.pkl.tmp").write_bytes(b"half")
        assert not list(tiny.train().glob(".*"))

    def test_progress_is_told_after_each_step(self, tiny: Any) -> None:
        told: list[tuple[int, int]] = []
        tiny.train(on_step=lambda *args: told.append(args))
        assert told == [(step, 6) for step in range(1, 7)]

    def test_half_precision_on_a_cpu(self, tiny: Any, records: Records, shelf: Shelf) -> None:
        full, half = records(shelf.get()), records(shelf.get(precision="bf16"))
        assert half[0]["machine"]["precision"] == "bf16"
        assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.05)
        assert half[0]["loss"] != full[0]["loss"]


class TestData:
    def test_unlabelled_images_of_held_out_domains(self, tiny: Any, records: Records, updates: list[Update]) -> None:
        flags = {"test_envs": [1], "uda_holdout_fraction": 0.5, "hparams": {"batch_size": 4}}
        all_records = records(tiny.train("adapted", task="domain_adaptation", **flags))
        assert all(record.keys() >= UPSTREAM_KEYS | {"env0_uda_acc"} for record in all_records)
        assert not any("env1_uda_acc" in record for record in all_records)
        assert all([x.shape for x in call.unlabeled] == [(4, 3, 28, 28)] for call in updates)
        seen = {image.numpy().tobytes() for call in updates for image in call.unlabeled[0]}
        trained = {image.numpy().tobytes() for call in updates for x, _ in call.minibatches for image in x}
        assert 0 < len(seen) <= 6
        assert not seen & trained
        updates.clear()
        assert all("env0_uda_acc" in record for record in records(tiny.train("general", **flags)))
        assert all(call.unlabeled is None for call in updates)

    def test_minibatches_come_from_training_domains_only(
        self, tiny: Any, updates: list[Update], gather_facts: Callable[..., Any]
    ) -> None:
        facts = gather_facts(test_envs=[0])
        updates.clear()
        tiny.train("erm", test_envs=[0])
        for domain, (in_, _) in enumerate(facts.splits[1:]):
            allowed = {x.numpy().tobytes() for x, _ in in_}
            batches = [call.minibatches[domain][0] for call in updates]
            assert all(len(batch) == 8 for batch in batches)
            assert {x.numpy().tobytes() for batch in batches for x in batch} <= allowed
        assert all(len(call.minibatches) == 2 for call in updates)

    def test_balanced_classes_of_a_domain_smaller_than_the_batch(self, tiny: Any, updates: list[Update]) -> None:
        """Such a loader draws each batch afresh, so it never waits for one that cannot be filled."""
        tiny.train(hparams={"class_balanced": True, "batch_size": 64}, steps=20, checkpoint_freq=20)
        labels = torch.cat([y for call in updates for _, y in call.minibatches])
        assert len(labels) == 20 * 2 * 64
        assert abs(labels.double().mean().item() - 0.5) < 0.05

    def test_a_domain_smaller_than_the_batch(self, tiny: Any, run_train: RunTrain) -> None:
        status, lines = run_train(tiny.make_argv(hparams={"batch_size": 14}))
        assert (status, len(lines)) == (2, 1)
        assert "env '1' has 13 training images but batch_size is 14" in lines[0]
        assert "--hparams '{\"batch_size\": 13}'" in lines[0]
        assert not (tiny.root / "run").exists()
        assert (tiny.train(hparams={"batch_size": 13}) / "done").is_file()

    def test_a_batch_that_no_domain_fills_is_capped_where_that_is_asked(self, tiny: Any) -> None:
        capped = tiny.train("capped", {"batch_size": 64}, cap_batch_size=True)
        whole = tiny.train("whole", {"batch_size": 13})
        first, wanted = (json.loads((run / "results.jsonl").read_text().splitlines()[0]) for run in (capped, whole))
        assert (first["hparams"]["batch_size"], first["args"]["cap_batch_size"]) == (13, True)
        assert first["loss"] == wanted["loss"]

    def test_a_held_out_domain_may_be_smaller(self, tiny: Any, image_folder: Path) -> None:
        for label in "xy":
            for picture in sorted((image_folder / "a" / label).iterdir())[:3]:
                picture.unlink()
        flags = {"dataset": f"folder:{image_folder}", "hparams": {"input_size": 16, "batch_size": 4}, "steps": 1}
        assert (tiny.train("held_out", test_envs=[0], holdout_fraction=0.4, **flags) / "done").is_file()
        with pytest.raises(UsageError, match="env 'a' has 3 training images but batch_size is 4"):
            tiny.train("trained", test_envs=[1], holdout_fraction=0.4, **flags)

    def test_a_cache_of_decoded_images_changes_no_bit(
        self, tiny: Any, image_folder: Path, tmp_path: Path, outcome: Callable[[Path], dict[str, str]]
    ) -> None:
        small = {"input_size": 16, "batch_size": 2, "teacher_steps": 2, "aft_steps": 1}
        flags = {"dataset": f"folder:{image_folder}", "hparams": small, "algorithm": "DAFT", "steps": 3}
        outcomes = []
        for name, cache in (("plain", None), ("cached", str(tmp_path / "cache"))):
            tiny.train(f"{name}/run", image_cache=cache, **flags)
            outcomes.append(outcome(tiny.root / name))
        assert outcomes[0] == outcomes[1]
        assert len([*(tmp_path / "cache").glob("*/images")]) == 3

    def test_an_interrupted_run_may_go_on_with_a_cache(self, tiny: Any, image_folder: Path, tmp_path: Path) -> None:
        def stop(step: int, n_steps: int) -> None:
            if step == 2:
                raise KeyboardInterrupt

        flags = {"dataset": f"folder:{image_folder}", "hparams": {"input_size": 16, "batch_size": 2}, "steps": 5}
        whole = load_states(tiny.train("whole", checkpoint_freq=1, **flags))
        with pytest.raises(KeyboardInterrupt):
            tiny.train(checkpoint_freq=1, on_step=stop, **flags)
        assert load_states(tiny.train(checkpoint_freq=1, image_cache=str(tmp_path / "cache"), **flags)) == whole

    def test_a_run_that_a_broken_image_ended_begins_anew(self, tiny: Any, image_folder: Path) -> None:
        flags = {"dataset": f"folder:{image_folder}", "hparams": {"input_size": 16, "batch_size": 2}, "steps": 2}
        whole = load_states(tiny.train("whole", **flags))
        picture = next(image_folder.rglob("*.png"))
        content = picture.read_bytes()
        picture.write_bytes(content[:-40])
        with pytest.raises(UsageError, match=f"cannot read the image {picture}: .*; mend or remove it"):
            tiny.train(**flags)
        picture.write_bytes(content)
        assert load_states(tiny.train(**flags)) == whole
        assert (tiny.root / "run" / "out.txt").read_text().count("Environment:") == 1

    def test_a_cache_is_for_image_folders(self, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tiny.train(image_cache=str(tmp_path / "cache"))
        assert "--image_cache has no effect: no domain is a plain image folder" in capsys.readouterr().err
        assert not (tmp_path / "cache").exists()

    def test_unlabelled_images_fewer_than_the_batch(self, tiny: Any) -> None:
        with pytest.raises(UsageError, match="env '0, unlabelled part' has 6 training images"):
            tiny.train(uda_holdout_fraction=0.5)


class TestOwnership:
    @pytest.fixture
    def start(self, tiny: Any, start_script: Callable[[str], WarmPopen]) -> Callable[[], WarmPopen]:
        """Starts a run in another process, which stops after two steps until the file `go` appears."""

        def run() -> WarmPopen:
            code = f"""
import sys, time
from pathlib import Path
sys.stdout = sys.stderr = open({str(tiny.root / "log")!r}, "w")
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.training.engine import train
def on_step(step, n_steps):
    if step == 2:
        Path({str(tiny.root / "waiting")!r}).touch()
        while not Path({str(tiny.root / "go")!r}).exists():
            time.sleep(0.01)
train(TrainArgs(**{tiny.make_flags()!r}), quiet=True, on_step=on_step)
"""
            process = start_script(code)
            wait_until(lambda: (tiny.root / "waiting").exists() or process.poll() is not None)
            assert process.poll() is None, (tiny.root / "log").read_text()
            return process

        return run

    def test_a_second_process_is_told_and_refused(
        self, tiny: Any, start: Callable[[], WarmPopen], run_train: RunTrain, outcome: Callable[..., Any], shelf: Shelf
    ) -> None:
        owner = start()
        before = {path: path.stat().st_mtime_ns for path in (tiny.root / "run").iterdir()}
        status, lines = run_train(tiny.make_argv())
        assert (status, len(lines)) == (2, 1)
        assert f"process {owner.pid} is at work in {tiny.root / 'run'}" in lines[0]
        assert {path: path.stat().st_mtime_ns for path in (tiny.root / "run").iterdir()} == before
        (tiny.root / "go").touch()
        owner.wait()
        assert owner.returncode == 0
        assert outcome(tiny.root / "run") == outcome(shelf.get())

    def test_the_lock_of_a_dead_owner_is_no_obstacle(
        self, tiny: Any, start: Callable[[], WarmPopen], outcome: Callable[..., Any], shelf: Shelf
    ) -> None:
        owner = start()
        assert owner.pid
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        assert json.loads((tiny.root / "run" / ".lock").read_text())["pid"] == owner.pid
        tiny.train()
        assert outcome(tiny.root / "run") == outcome(shelf.get())

    def test_one_that_waits_takes_what_the_owner_made(
        self, tiny: Any, start: Callable[[], WarmPopen], capfd: pytest.CaptureFixture[str]
    ) -> None:
        owner = start()
        threading.Timer(0.3, (tiny.root / "go").touch).start()
        done: list[int] = []
        train(TrainArgs(**tiny.make_flags()), quiet=True, as_teacher=True, on_step=lambda step, n: done.append(step))
        owner.wait()
        assert owner.returncode == 0
        assert done == []
        assert f"waiting for process {owner.pid}" in capfd.readouterr().err

    def test_one_that_waits_for_a_process_that_dies_goes_on_with_its_run(
        self, tiny: Any, start: Callable[[], WarmPopen], outcome: Callable[..., Any], shelf: Shelf
    ) -> None:
        owner = start()
        threading.Timer(0.3, owner.kill).start()
        done: list[int] = []
        train(TrainArgs(**tiny.make_flags()), quiet=True, as_teacher=True, on_step=lambda step, n: done.append(step))
        assert done == [2, 3, 4, 5, 6]
        assert outcome(tiny.root / "run") == outcome(shelf.get())


class TestSecondStart:
    def read_times(self, folder: Path) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    @pytest.mark.parametrize(
        "flags",
        [
            {},
            {"hparams": {"lr": 1e-3}},
            {"device": "auto"},
            {"data_dir": "/elsewhere"},
            {"teachers_dir": "/elsewhere"},
            {"image_cache": "/elsewhere"},
        ],
        ids=str,
    )
    def test_a_finished_run_is_left_as_it_is(
        self, tiny: Any, run_train: RunTrain, flags: dict[str, Any], shelf: Shelf
    ) -> None:
        run = shelf.copy(tiny.root / "run", {"lr": 0.001})
        before = self.read_times(run)
        said = [f"{run} is done already, with the same data and arguments"]
        assert run_train(tiny.make_argv(**{"hparams": {"lr": 0.001}, **flags})) == (0, said)
        assert self.read_times(run) == before

    def test_a_finished_run_may_have_moved(self, tiny: Any, shelf: Shelf) -> None:
        shelf.copy(tiny.root / "elsewhere")
        before = self.read_times(tiny.root / "elsewhere")
        tiny.train("elsewhere")
        assert self.read_times(tiny.root / "elsewhere") == before

    @pytest.mark.parametrize("is_finished", [True, False])
    @pytest.mark.parametrize(
        ("flags", "phrase"),
        [
            ({"steps": 7}, "steps is 6 there and 7 here"),
            ({"seed": 1}, "seed is 0 there and 1 here"),
            ({"test_envs": [1]}, "test_envs is [0] there and [1] here"),
            ({"algorithm": "KD"}, "algorithm is ERM there and KD here"),
            ({"dataset": "ColoredDigits"}, "dataset is Debug28 there and ColoredDigits here"),
            ({"hparams": {"lr": 0.5}}, '"lr": 0.5} here'),
            ({"precision": "bf16"}, "precision is fp32 there and bf16 here"),
            ({"checkpoint_freq": 5}, "checkpoint_freq is 2 there and 5 here"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_other_arguments_are_refused(
        self, tiny: Any, run_train: RunTrain, is_finished: bool, flags: dict[str, Any], phrase: str, shelf: Shelf
    ) -> None:
        run = shelf.copy(tiny.root / "run", stop_at=None if is_finished else 3)
        assert (run / "done").exists() == is_finished
        before = self.read_times(run)
        status, lines = run_train(tiny.make_argv(**flags))
        assert (status, len(lines)) == (2, 1)
        assert ("a finished run" if is_finished else "an unfinished run") in lines[0]
        assert phrase in lines[0]
        assert self.read_times(run) == before

    def test_records_that_cannot_be_gone_on_with(self, tiny: Any, run_train: RunTrain) -> None:
        """Upstream's own unfinished run, or no run at all: it is not ours to delete."""
        (tiny.root / "run").mkdir()
        for content in ('{"step": 0, "args": {}}\n', "no record\n", ""):
            (tiny.root / "run" / "results.jsonl").write_text(content)
            status, lines = run_train(tiny.make_argv())
            assert (status, len(lines)) == (2, 1)
            assert "holds records of a run that cannot be gone on with" in lines[0]
            assert (tiny.root / "run" / "results.jsonl").read_text() == content
            assert len(list((tiny.root / "run").iterdir())) == 1

    def test_a_damaged_resume_file(self, tiny: Any, run_train: RunTrain, shelf: Shelf) -> None:
        path = shelf.copy(tiny.root / "run", stop_at=1) / "resume.pt"
        whole = path.read_bytes()
        damaged = whole[:5000] + bytes(500) + whole[5500:]
        path.write_bytes(damaged)
        status, lines = run_train(tiny.make_argv())
        assert (status, len(lines)) == (2, 1)
        assert str(path) in lines[0]
        assert path.read_bytes() == damaged


class TestFailures:
    def test_a_loss_that_is_not_finite(self, tiny: Any, run_train: RunTrain, updates: list[Update]) -> None:
        argv = tiny.make_argv(hparams={"lr": 1e30})
        ends = []
        for _ in range(2):  # the same again ends the same
            status, lines = run_train(argv)
            ends.append(lines[-1])
            assert status == 1
            assert f"loss is {updates[-1].values['loss']}" in lines[-1]
            assert "kept in" in lines[-1]
            assert "(resume.pt, model_best.pkl)" in lines[-1]
            assert "lower lr than 1e+30" in lines[-1]
            assert {path.name for path in (tiny.root / "run").iterdir()} == {
                *("results.jsonl", "resume.pt", "model_best.pkl", "out.txt", "err.txt")
            }
            state = checkpoints.load_checkpoint(tiny.root / "run" / "model_best.pkl")["model_dict"]
            assert all(torch.isfinite(tensor).all() for tensor in state.values())
            weights.load(tiny.root / "run" / "resume.pt")
        assert ends[0] == ends[1]

    def test_the_step_at_which_it_happened(self, tiny: Any, monkeypatch: pytest.MonkeyPatch, records: Records) -> None:
        kind = contract.find_host().algorithms.ERM
        values = iter([1.0, 1.0, 1.0, float("inf")])
        monkeypatch.setattr(kind, "update", lambda self, *args: {"loss": 1.0, "penalty": next(values)})
        with pytest.raises(RunError, match="step 3: penalty is inf"):
            tiny.train()
        assert [record["step"] for record in records(tiny.root / "run")] == [0, 2]

    def test_a_full_disk_wherever_it_fills_up(
        self, tiny: Any, run_train: RunTrain, outcome: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, shelf: Shelf
    ) -> None:
        """Every write in turn fails once; the same command then goes on, and ends as if nothing had been."""
        whole = shelf.read(algorithm="KD")
        open_file, n_writes = Path.open, 0

        def open_or_fail(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            nonlocal n_writes
            if "r" not in mode and tiny.root in self.parents:
                n_writes += 1
                if n_writes == fails_at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
            return open_file(self, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "open", open_or_fail)
        argv = tiny.make_argv("disturbed/run", algorithm="KD")
        fails_at = 1
        while True:
            n_writes = 0
            status, lines = run_train(argv)
            if status == 0:
                break
            assert status == 1
            assert "the disk is full at" in lines[-1]
            assert "give the same command again" in lines[-1]
            assert not [path for path in (tiny.root / "disturbed").rglob(".*") if path.suffix in (".tmp", ".lock")]
            fails_at += 1
        assert fails_at > 10
        assert outcome(tiny.root / "disturbed") == whole

    @pytest.mark.parametrize("room", [2_000, 40_000, 90_000, 150_000, 230_000])
    def test_a_disk_that_is_full_indeed(
        self, tiny: Any, small_disk: Path, run_train: RunTrain, outcome: Callable[..., Any], room: int, shelf: Shelf
    ) -> None:
        flags = {"algorithm": "KD", "save_model_every_checkpoint": True}
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        (small_disk / "filler").write_bytes(bytes(free - room))
        argv = tiny.make_argv(**flags, output_dir=str(small_disk / "disturbed" / "run"))
        for _ in range(2):
            status, lines = run_train(argv)
            assert status == 1
            assert "the disk is full" in lines[-1]
        (small_disk / "filler").unlink()
        assert run_train(argv)[0] == 0
        assert outcome(small_disk / "disturbed") == shelf.read(**flags)

    def test_a_folder_that_cannot_be_written(self, tiny: Any, run_train: RunTrain) -> None:
        tiny.train("before", steps=1)  # imports what another user may not be able to read
        folder = Path(tempfile.mkdtemp())
        user = os.geteuid()
        try:
            folder.chmod(0o555)
            if user == 0:
                os.seteuid(65534)  # root may write everywhere
            status, lines = run_train(tiny.make_argv(output_dir=str(folder)))
            below, lines_below = run_train(tiny.make_argv(output_dir=str(folder / "run")))
        finally:
            os.seteuid(user)
            assert not list(folder.iterdir())
            folder.rmdir()
        assert (status, below) == (2, 2)
        for path, (line,) in ((folder, lines), (folder / "run", lines_below)):
            assert line == (
                f"daft-domainbed train: --output_dir {path} cannot be written (Permission denied): choose another"
            )

    def test_errors_that_are_no_fault_of_the_folder_stay_what_they_are(
        self, tiny: Any, run_train: RunTrain, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(self: Path, *args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

        monkeypatch.setattr(Path, "mkdir", fail)
        status, lines = run_train(tiny.make_argv())
        assert status == 1
        assert "the disk is full" in lines[0]


class TestHelpers:
    DATASET = describe_dataset(contract.find_host(), "Debug28", {})

    def test_stages(self) -> None:
        assert list_stages("KD") == ["KD", "ERM"]
        assert list_stages("AFT") == ["AFT", "ERM"]
        assert list_stages("IRM") == ["IRM"]

    @pytest.mark.parametrize("test_envs", [[], [0], [2, 0]])
    def test_test_environments_that_leave_some_to_train_on(self, test_envs: list[int]) -> None:
        check_test_envs(test_envs, self.DATASET)

    @pytest.mark.parametrize(
        ("test_envs", "match"),
        [([3], "--test_envs 3"), ([-1], "--test_envs -1"), ([0, 0], "named twice"), ([0, 1, 2], "all 3 environments")],
    )
    def test_test_environments_that_cannot_be(self, test_envs: list[int], match: str) -> None:
        with pytest.raises(UsageError, match=match):
            check_test_envs(test_envs, self.DATASET)

    def test_the_processor_has_a_name_everywhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: Path) -> None:
            raise OSError

        monkeypatch.setattr(Path, "read_text", fail)
        machine = describe_machine(torch.device("cpu"), "fp32")
        assert machine["cpu"]
        assert machine["device"] == "cpu"
