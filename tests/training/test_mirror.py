"""Records are copied to the programs that follow a run, which can neither change nor end it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.errors import UsageError
from daft_domainbed.training import mirror
from tests.conftest import read_records, strip_times


class Fake:
    """Keeps what it is told; draws random numbers, and fails at its second record where it is told to."""

    made: list[Fake] = []

    def __init__(self, folder: Path, args: Any, hparams: Mapping[str, Any]) -> None:
        self.group, self.told, self.is_closed = mirror.name_group(folder), list[Mapping[str, Any]](), False
        Fake.made.append(self)

    def write(self, record: Mapping[str, Any]) -> None:
        import torch

        torch.rand(3)
        if len(self.told) == 1 and not self.group.endswith("whole"):
            raise OSError("no route to host")
        self.told.append(record)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    monkeypatch.setattr(mirror, "find_spec", lambda name: object())
    monkeypatch.setitem(mirror.WRITERS, "wandb", Fake)
    monkeypatch.setattr(Fake, "made", [])
    return Fake.made


def test_records_are_copied_and_stay_as_they_are(tiny: Any) -> None:
    plain, watched = tiny.train("plain/run"), tiny.train("whole/run", log=["wandb"])
    (fake,) = Fake.made
    assert fake.is_closed and fake.group == "whole"
    assert [record["step"] for record in fake.told] == [record["step"] for record in read_records(plain)]
    ours, theirs = ([strip_times(record) for record in read_records(run)] for run in (plain, watched))
    for record in (*ours, *theirs):
        record["args"].pop("log")
    assert ours == theirs


def test_a_log_that_fails_is_left_and_the_run_goes_on(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.train("lost/run", log=["wandb"])
    assert (run / "done").is_file() and len(read_records(run)) > 2
    said = "--log wandb ends here, the run goes on: OSError: no route to host"
    assert (run / "err.txt").read_text().count(said) == 1


def test_what_went_before_is_copied_when_a_run_goes_on(tiny: Any) -> None:
    class Killed(BaseException):
        pass

    def stop(step: int, n_steps: int) -> None:
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        tiny.train("whole/run", on_step=stop)
    run = tiny.train("whole/run", log=["wandb"])  # which does not make it another run
    assert [record["step"] for record in Fake.made[-1].told] == [record["step"] for record in read_records(run)]


def test_a_missing_package_is_named_before_anything_is_trained(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--log wandb needs wandb: pip install 'daft-domainbed\[log\]'"):
        tiny.train(log=["wandb"])
    assert not (tiny.root / "run").exists()


def test_tensorboard_has_the_numbers(tiny: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tiny.train(log=["tensorboard"], steps=3)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("env1_in_acc")]
    expected = [(record["step"], record["env1_in_acc"]) for record in read_records(run)]
    assert found == [(step, pytest.approx(value)) for step, value in expected]
    assert "args" not in json.dumps(events.Tags())
