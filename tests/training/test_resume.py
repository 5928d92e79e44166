"""A run that was stopped, wherever and however often, ends as one that never was: records and weights, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from daft_domainbed import plugin
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.errors import UsageError
from daft_domainbed.host import contract
from daft_domainbed.models import weights
from daft_domainbed.teachers.teacher import Teacher
from daft_domainbed.training import engine, resume
from tests.conftest import Shelf, Stopped, stop_after
from tests.processes import WarmPopen, run_warm, wait_until

Outcome = Callable[[Path], dict[str, str]]
Records = Callable[[Path], list[dict[str, Any]]]
FOLDER_HPARAMS = {"input_size": 16, "batch_size": 4}

# Each has a random stream of its own that has to go on where it was.
RUNS: dict[str, dict[str, Any]] = {
    "ERM": {},
    "AFT": {"algorithm": "AFT"},
    "AFT of all weights": {"algorithm": "AFT", "hparams": {"aft_scope": "all", "aft_weight": 0.5}},
    "DAFT": {"algorithm": "DAFT"},
    "balanced": {"hparams": {"class_balanced": True, "batch_size": 20}},
    "adapting": {"task": "domain_adaptation", "uda_holdout_fraction": 0.5, "hparams": {"batch_size": 5}},
    "without workers": {"dataset": "ColoredDigits", "hparams": {"weight_decay": 0.01}},
    "bf16": {"precision": "bf16"},
}


LONG = (pytest.mark.long, pytest.mark.slow)


class TestStops:
    @pytest.mark.parametrize(
        ("name", "saves"),
        # Going back to a checkpoint is the same for all: it is tried where the most can be forgotten.
        [(name, "at every step") for name in RUNS]
        + [(name, "at checkpoints") for name in ("ERM", "DAFT", "without workers")],
    )
    def test_at_every_step(
        self, tiny: Any, outcome: Outcome, monkeypatch: pytest.MonkeyPatch, name: str, saves: str, shelf: Shelf
    ) -> None:
        whole = shelf.read(**RUNS[name])
        if saves == "at every step":
            monkeypatch.setattr(engine, "SECONDS_BETWEEN_SAVES", -1.0)
        for step in range(1, 7):
            with pytest.raises(Stopped):
                tiny.train("stopped/run", on_step=stop_after(step), **RUNS[name])
        tiny.train("stopped/run", **RUNS[name])
        assert outcome(tiny.root / "stopped") == whole

    def test_of_virtual_workers_that_augment(
        self, tiny: Any, outcome: Outcome, image_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine, "SECONDS_BETWEEN_SAVES", -1.0)
        flags = {"dataset": f"folder:{image_folder}", "hparams": FOLDER_HPARAMS}
        tiny.train("undisturbed/run", **flags)
        for step in (1, 2, 3, 5):
            with pytest.raises(Stopped):
                tiny.train("stopped/run", on_step=stop_after(step), **flags)
        tiny.train("stopped/run", **flags)
        assert outcome(tiny.root / "stopped") == outcome(tiny.root / "undisturbed")

    def test_of_a_student_of_before_goes_on_with_its_network(
        self, tiny: Any, outcome: Outcome, image_folder: Path
    ) -> None:
        """Its arguments name no network, and its records say "default", which is another one than today's."""

        def run(folder: str, hparams: dict[str, Any], last: int | None = None) -> None:
            changes = {"dataset": f"folder:{image_folder}", "steps": 3, "hparams": json.dumps(hparams)}
            engine.train(TrainArgs(**tiny.make_flags(folder) | changes), quiet=True, on_step=stop_after(last))

        now: dict[str, Any] = {"batch_size": 4, "input_size": 28}
        before = {"ERM": {"backbone": "default"}} | now
        run("whole/run", before)
        with pytest.raises(Stopped):
            run("stopped/run", before, 2)
        saved = tiny.root / "stopped" / "run" / "resume.pt"
        state = weights.load(saved)
        state["args"]["hparams"] = json.dumps(now)
        weights.save(state, saved)
        run("stopped/run", now)
        assert outcome(tiny.root / "stopped") == outcome(tiny.root / "whole")

    def test_within_the_teachers(
        self, tiny: Any, outcome: Outcome, monkeypatch: pytest.MonkeyPatch, shelf: Shelf
    ) -> None:
        flags: dict[str, Any] = {"algorithm": "DAFT", "hparams": {"aft_steps": 3}}
        whole = shelf.read(**flags)
        monkeypatch.setattr(engine, "SECONDS_BETWEEN_SAVES", -1.0)
        host = contract.find_host()
        plugin.register(host)
        left = 0
        for kind in (host.algorithms.ERM, host.algorithms.AFT, host.algorithms.DAFT):

            def update(self: Any, *args: Any, original: Any = kind.update) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Stopped
                return original(self, *args)

            monkeypatch.setattr(kind, "update", update)
        n_stops = 0
        while True:
            left = 2  # steps that a start lives
            try:
                tiny.train("stopped/run", **flags)
            except Stopped:
                n_stops += 1
            else:
                break
        assert n_stops == (6 + 3 + 6) // 2
        assert outcome(tiny.root / "stopped") == whole

    def test_before_and_after_every_write(
        self, tiny: Any, outcome: Outcome, monkeypatch: pytest.MonkeyPatch, shelf: Shelf
    ) -> None:
        """Between the resume file and the record that it announces, between `model.pkl` and `done`, and so on."""
        whole = shelf.read(algorithm="KD")
        n_events = stops_at = 0

        def tick() -> None:
            nonlocal n_events
            n_events += 1
            if n_events == stops_at:
                raise Stopped

        def watch(holder: Any, name: str) -> None:
            original = getattr(holder, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                tick()
                result = original(*args, **kwargs)
                if name != "open":  # a kill would close what was opened
                    tick()
                return result

            monkeypatch.setattr(holder, name, call)

        for holder, name in ((Path, "replace"), (Path, "unlink"), (Path, "open"), (os, "fsync")):
            watch(holder, name)
        stops_at = 1
        while True:
            n_events = 0
            try:
                tiny.train("stopped/run", algorithm="KD")
            except Stopped:
                stops_at += 1
            else:
                break
        assert stops_at > 20
        monkeypatch.undo()
        assert outcome(tiny.root / "stopped") == whole


class TestRecords:
    @pytest.fixture
    def stopped(self, tiny: Any, shelf: Shelf) -> Path:
        """The folder of a run that was stopped after its second record."""
        return shelf.copy(tiny.root / "stopped" / "run", stop_at=3)

    def finish(self, tiny: Any, outcome: Outcome, shelf: Shelf) -> None:
        tiny.train("stopped/run")
        assert outcome(tiny.root / "stopped") == shelf.read()

    def test_those_beyond_the_resume_point_are_dropped(
        self, tiny: Any, outcome: Outcome, stopped: Path, shelf: Shelf
    ) -> None:
        path = stopped / "results.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines, lines[1].replace('"step": 2', '"step": 4'), "more"]) + "\n")
        self.finish(tiny, outcome, shelf)

    def test_a_half_written_one_is_dropped(self, tiny: Any, outcome: Outcome, stopped: Path, shelf: Shelf) -> None:
        with (stopped / "results.jsonl").open("a") as file:
            file.write('{"args": {"algor')
        self.finish(tiny, outcome, shelf)

    @pytest.mark.parametrize("keep", [0, 10, -1])
    def test_the_one_that_was_about_to_be_written_is_kept(
        self, tiny: Any, outcome: Outcome, stopped: Path, keep: int, shelf: Shelf
    ) -> None:
        path = stopped / "results.jsonl"
        first, last = path.read_text().splitlines()
        path.write_text(first + "\n" + (last + "\n")[:keep])
        self.finish(tiny, outcome, shelf)

    def test_those_that_were_kept_are_not_made_again(self, tiny: Any, records: Records, stopped: Path) -> None:
        before = records(stopped)
        tiny.train("stopped/run")
        assert records(stopped)[:2] == before  # times included

    def test_lost_ones_are_not_passed_over(self, tiny: Any, stopped: Path) -> None:
        lines = (stopped / "results.jsonl").read_text().splitlines()
        (stopped / "results.jsonl").write_text("broken\n" + lines[1] + "\n")
        with pytest.raises(UsageError, match="has lost records"):
            tiny.train("stopped/run")
        (stopped / "results.jsonl").unlink()
        with pytest.raises(UsageError, match="has lost records"):
            tiny.train("stopped/run")
        assert (stopped / "resume.pt").is_file()

    def test_seconds_add_up_over_the_starts(self, tiny: Any, records: Records, stopped: Path) -> None:
        before = weights.load(stopped / "resume.pt")["seconds"]
        tiny.train("stopped/run")
        assert records(stopped)[-1]["seconds"] > before > 0

    def test_a_start_that_goes_on_says_so(self, tiny: Any, stopped: Path) -> None:
        tiny.train("stopped/run")
        assert (stopped / "err.txt").read_text() == f"{stopped}: going on at step 3 of 6\n"


class TestWhatHasChanged:
    def test_the_folder_may_have_moved(self, tiny: Any, outcome: Outcome, shelf: Shelf) -> None:
        with pytest.raises(Stopped):
            tiny.train("stopped/run", on_step=stop_after(3))
        shutil.move(tiny.root / "stopped", tiny.root / "moved")
        tiny.train("moved/run")
        assert outcome(tiny.root / "moved") == shelf.read()

    def test_the_data_may_not_change(self, tiny: Any, image_folder: Path) -> None:
        flags = {"dataset": f"folder:{image_folder}", "hparams": FOLDER_HPARAMS}
        with pytest.raises(Stopped):
            tiny.train(on_step=stop_after(3), **flags)
        picture = image_folder / "c" / "x" / "2.png"
        whole = picture.read_bytes()
        picture.write_bytes(whole + b"more")
        with pytest.raises(UsageError, match="the data have changed since .* was begun .the data of env2_"):
            tiny.train(**flags)
        picture.write_bytes(whole)
        assert (tiny.train(**flags) / "done").is_file()

    def test_the_images_may_have_moved(self, tiny: Any, image_folder: Path) -> None:
        flags = {"hparams": FOLDER_HPARAMS}
        with pytest.raises(Stopped):
            tiny.train(on_step=stop_after(3), dataset=f"folder:{image_folder}", **flags)
        moved = tiny.root / "elsewhere" / image_folder.name
        shutil.move(image_folder, moved)
        assert (tiny.train(dataset=f"folder:{moved}", **flags) / "done").is_file()

    def test_the_teacher_may_not_change(self, tiny: Any, teachers: dict[str, Path]) -> None:
        """A search of a folder finds what is best now; half a run with each would be nobody's result."""
        store = tiny.root / "store"
        shutil.copytree(teachers["ERM"].parent, store / "one")
        flags = {"algorithm": "KD", "hparams": {"teacher": str(store)}}
        with pytest.raises(Stopped):
            tiny.train(on_step=stop_after(3), **flags)
        better = tiny.make_teacher("ERM", "store/better", hparams_seed=2)
        lines = (better.parent / "results.jsonl").read_text().splitlines()
        lines[-1] = json.dumps(json.loads(lines[-1]) | {"env1_out_acc": 1.0, "env2_out_acc": 1.0})
        (better.parent / "results.jsonl").write_text("\n".join(lines))
        before = (tiny.root / "run" / "results.jsonl").read_bytes()
        with pytest.raises(UsageError, match=r"another teacher \(\.\./store/better/model\.pkl\) answers now"):
            tiny.train(**flags)
        assert (tiny.root / "run" / "results.jsonl").read_bytes() == before
        shutil.rmtree(better.parent)
        assert (tiny.train(**flags) / "done").is_file()


class TestCapture:
    class Algorithm(nn.Module):
        """Keeps state in all the places that an algorithm may choose."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.hparams = {"lr": seed}
            self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
            self.register_buffer("mean", torch.randn(2))
            self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.1)
            self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
            self.generator = torch.Generator().manual_seed(seed)
            self.update_count = 0
            self.history: list[float] = []
            self.moments = {"mean": torch.zeros(2), "names": ("a", "b"), "none": None}
            self.teacher = Teacher.__new__(Teacher)  # every start finds it anew
            self.network[0].calls = 0

        def update(self) -> float:
            x = torch.randn(8, 3, generator=self.generator)
            loss = (self.network(x) - self.mean).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.update_count += 1
            self.history.append(loss.item())
            self.moments["mean"] = self.moments["mean"] + loss.detach()
            self.network[0].calls += 1
            return loss.item()

    def test_an_algorithm_goes_on_where_it_was(self, tmp_path: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            one, two = self.Algorithm(1), self.Algorithm(2)
        for _ in range(3):
            one.update()
        weights.save(resume.capture(one), tmp_path / "state")
        resume.restore(two, weights.load(tmp_path / "state"))
        assert [one.update() for _ in range(5)] == [two.update() for _ in range(5)]
        assert one.history == two.history
        assert two.update_count == 8
        assert torch.equal(one.moments["mean"], two.moments["mean"])
        assert two.moments["names"] == ("a", "b")
        assert two.network[0].calls == 8
        assert weights.hash_state(one.state_dict()) == weights.hash_state(two.state_dict())

    def test_what_every_start_makes_anew_is_left_out(self) -> None:
        with torch.random.fork_rng(devices=[]):
            algorithm = self.Algorithm(1)
        names = resume.capture(algorithm)["attributes"].keys()
        own = {"/optimizer", "/schedule", "/generator", "/update_count", "/history", "/moments", "network.0/calls"}
        assert own <= names
        assert not {"/hparams", "/teacher", "/training", "network/training"} & names

    def test_weights_of_another_shape_are_not_taken(self) -> None:
        with torch.random.fork_rng(devices=[]):
            one, two = self.Algorithm(1), self.Algorithm(2)
            two.network = nn.Sequential(nn.Linear(3, 5))
        with pytest.raises(RuntimeError):
            resume.restore(two, resume.capture(one))


class TestKills:
    """The real command in a process of its own, killed with a signal that nothing can catch."""

    RUNS: ClassVar[dict[str, dict[str, Any]]] = {
        "ERM": {"steps": 40, "checkpoint_freq": 7},
        "DAFT": {"algorithm": "DAFT", "steps": 20, "checkpoint_freq": 7},
    }

    def make_code(self, tiny: Any, prologue: str = "", **flags: Any) -> str:
        return f"""
import os, signal, sys
sys.stdout = sys.stderr = open({str(tiny.root / "log")!r}, "a")
from daft_domainbed.models import weights
from daft_domainbed.runtime import files
from daft_domainbed.teachers import find, teacher
from daft_domainbed.training import engine, recorder, resume, run_folder
from daft_domainbed.cli import run_command
engine.SECONDS_BETWEEN_SAVES = 0.02
{prologue}
status = run_command("train", {tiny.make_argv("killed/run", **flags)!r})
sys.stdout.flush()
sys.exit(status)
"""

    def wait(self, process: WarmPopen, tiny: Any, timeout: float | None = None) -> bool:
        """Return whether a process has ended; a failure of its own fails the test."""
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        assert process.returncode in (None, 0, -signal.SIGKILL), (tiny.root / "log").read_text()[-2000:]
        return process.returncode == 0

    def wait_for_records(self, process: WarmPopen, tiny: Any) -> None:
        wait_until(lambda: process.poll() is not None or list((tiny.root / "killed").rglob("*.jsonl")))

    @pytest.mark.long
    @pytest.mark.slow
    @pytest.mark.parametrize("name", RUNS)
    @pytest.mark.parametrize("seed", range(4))
    def test_at_random_moments(
        self, tiny: Any, outcome: Outcome, start_script: Callable[[str], WarmPopen], name: str, seed: int, shelf: Shelf
    ) -> None:
        draw = random.Random(seed)
        n_kills = 0
        while True:
            process = start_script(self.make_code(tiny, **self.RUNS[name]))
            if n_kills < 4:
                # Not before there is anything to lose.
                self.wait_for_records(process, tiny)
                if not self.wait(process, tiny, timeout=draw.uniform(0, 0.4)):
                    process.kill()
                    process.wait()
                    n_kills += 1
                    continue
            if self.wait(process, tiny):
                break
        assert n_kills
        assert outcome(tiny.root / "killed") == shelf.read(**self.RUNS[name])

    @pytest.mark.parametrize("algorithm", ["ERM", "DAFT"])
    @pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=LONG) for seed in range(1, 6))])
    def test_at_random_lines(
        self,
        tiny: Any,
        outcome: Outcome,
        start_script: Callable[[str], WarmPopen],
        algorithm: str,
        seed: int,
        shelf: Shelf,
    ) -> None:
        """The same without a clock: killed when it has executed so many lines of this package's own."""
        prologue = """
files = {{module.__file__ for module in (weights, files, engine, recorder, resume, run_folder, find, teacher)}}
left = {n_lines}
def trace(frame, event, arg):
    global left
    if frame.f_code.co_filename not in files:
        return None
    left -= event == "line"
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace
sys.settrace(trace)
"""
        draw = random.Random(seed)
        kills = [int(10 ** draw.uniform(2, 3.5)) for _ in range(4)]
        for n_lines in kills:
            code = self.make_code(tiny, prologue.format(n_lines=n_lines), algorithm=algorithm)
            if self.wait(start_script(code), tiny):
                break
        else:
            assert self.wait(start_script(self.make_code(tiny, algorithm=algorithm)), tiny)
        assert outcome(tiny.root / "killed") == shelf.read(algorithm=algorithm)

    def test_the_same_command_goes_on(self, tiny: Any, outcome: Outcome, shelf: Shelf) -> None:
        argv = tiny.make_argv("killed/run", **self.RUNS["DAFT"])
        command = [sys.executable, "-m", "daft_domainbed.scripts.train", *argv]
        process = WarmPopen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.wait_for_records(process, tiny)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert run_warm(command).returncode == 0
        assert outcome(tiny.root / "killed") == shelf.read(**self.RUNS["DAFT"])


@dataclass(frozen=True)
class Fixed:
    content: Any


def test_only_what_a_step_may_change_is_missed() -> None:
    algorithm = nn.Module()
    algorithm.functions, algorithm.fixed = (len, max), Fixed((1.0, "a"))  # type: ignore[assignment]
    algorithm.tensor, algorithm.stream = Fixed(torch.ones(1)), iter([1])  # type: ignore[assignment]
    assert resume.list_unsaved(algorithm) == ["tensor", "stream"]
