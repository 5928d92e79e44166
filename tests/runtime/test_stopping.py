"""The first signal lets a run save itself, the second one does not wait for that; nothing shows it afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.runtime import locks, stopping
from daft_domainbed.runtime.stopping import Stopped
from daft_domainbed.training.engine import train
from tests.conftest import Shelf
from tests.processes import REPOSITORY, WarmPopen, wait_until

Outcome = Callable[[Path], dict[str, str]]
Start = Callable[[str], WarmPopen]

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def make_code(tiny: Any, prologue: str = "", **flags: Any) -> str:
    """Return a script that is the command `train` with something done to it before."""
    return f"""
import os, signal, sys, time
from pathlib import Path
sys.stdout, sys.stderr = open(os.devnull, "w"), open({str(tiny.root / "log")!r}, "w")
from daft_domainbed.cli import run_command
from daft_domainbed.host.contract import find_host
from daft_domainbed.runtime import stopping
from daft_domainbed.training import engine
host = find_host()
root = Path({str(tiny.root)!r})
{prologue}
sys.exit(run_command("train", {tiny.make_argv("stopped/run", **flags)!r}))
"""


def run(tiny: Any, start_script: Start, prologue: str = "", **flags: Any) -> tuple[int | None, str]:
    """Run a script to its end; return its exit status and what it said on standard error."""
    process = start_script(make_code(tiny, prologue, **flags))
    process.wait(120)
    return process.returncode, (tiny.root / "log").read_text()


def hit(number: int, at: int, algorithm: str = "ERM") -> str:
    """Return what has a run receive a signal in the middle of an algorithm's step."""
    return f"""
kind, left = host.algorithms.{algorithm}, {at}
update = kind.update
def update_and_hit(self, *args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), {int(number)})
    return update(self, *args)
kind.update = update_and_hit
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("at", [1, 2, 5])
def test_stopped_run_goes_on_as_if_nothing_had_been(
    tiny: Any, outcome: Outcome, start_script: Start, number: int, at: int, shelf: Shelf
) -> None:
    status, said = run(tiny, start_script, hit(number, at))
    assert status == 128 + number
    assert said == (
        f"daft-domainbed train: stopped at step {at} of 6 in {tiny.root}/stopped/run; the same command goes on\n"
    )
    assert (tiny.root / "stopped/run/resume.pt").is_file()
    assert not (tiny.root / "stopped/run/.lock").exists()
    status, said = run(tiny, start_script)
    assert (status, said) == (0, f"{tiny.root}/stopped/run: going on at step {at} of 6\n")
    assert outcome(tiny.root / "stopped") == shelf.read()


def test_signal_before_the_first_step_stops_after_it(tiny: Any, start_script: Start) -> None:
    prologue = f"""
build = engine.build_data
def build_and_hit(*args):
    os.kill(os.getpid(), {int(signal.SIGTERM)})
    return build(*args)
engine.build_data = build_and_hit
"""
    status, said = run(tiny, start_script, prologue)
    assert status == 143
    assert "stopped at step 1 of 6" in said


def test_signal_in_the_last_step_comes_too_late(tiny: Any, outcome: Outcome, start_script: Start, shelf: Shelf) -> None:
    assert run(tiny, start_script, hit(signal.SIGTERM, 6)) == (0, "")
    assert outcome(tiny.root / "stopped") == shelf.read()


@pytest.mark.parametrize("at", [3, 6])
def test_stopped_within_a_teacher(tiny: Any, outcome: Outcome, start_script: Start, at: int, shelf: Shelf) -> None:
    status, said = run(tiny, start_script, hit(signal.SIGTERM, at), algorithm="KD")
    assert status == 143
    # With the teacher done, the student's first step is where it stops.
    folder, step = ("teachers/ERM-", 3) if at == 3 else ("run", 1)
    assert f"stopped at step {step} of 6 in {tiny.root}/stopped/{folder}" in said.splitlines()[-1]
    assert run(tiny, start_script, algorithm="KD")[0] == 0
    assert outcome(tiny.root / "stopped") == shelf.read(algorithm="KD")


@pytest.mark.parametrize("number", SIGNALS)
def test_second_signal_ends_it_in_the_middle_of_a_step(
    tiny: Any, outcome: Outcome, start_script: Start, number: int, shelf: Shelf
) -> None:
    process = start_script(
        make_code(
            tiny,
            """
update = host.algorithms.ERM.update
n_steps = 0
def update_or_hang(self, *args):
    global n_steps
    n_steps += 1
    if n_steps == 4:
        (root / "hangs").touch()
        while not stopping.is_requested():
            time.sleep(0.005)
        (root / "asked").touch()
        time.sleep(600)
    return update(self, *args)
host.algorithms.ERM.update = update_or_hang
""",
        )
    )
    assert process.pid
    wait_until((tiny.root / "hangs").exists)
    os.kill(process.pid, number)
    wait_until((tiny.root / "asked").exists)
    assert process.poll() is None
    os.kill(process.pid, number)
    process.wait(120)
    assert process.returncode == 130
    assert (tiny.root / "log").read_text() == (
        "daft-domainbed train: interrupted; give the same command again to go on from here\n"
    )
    assert not (tiny.root / "stopped/run/.lock").exists()
    tiny.train("stopped/run")
    assert outcome(tiny.root / "stopped") == shelf.read()


def test_from_the_shell(tiny: Any) -> None:
    argv = tiny.make_argv(steps=1_000_000, checkpoint_freq=1_000_000)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "daft_domainbed.scripts.train", *argv]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: (tiny.root / "run/results.jsonl").exists() or process.poll() is not None)
        process.terminate()
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    (line,) = said.splitlines()
    assert line.startswith("daft-domainbed train: stopped at step ")
    assert not (tiny.root / "run/.lock").exists()


def test_who_waits_for_another_process_stops_too(tiny: Any) -> None:
    (tiny.root / "run").mkdir()
    with locks.claim(tiny.root / "run"), stopping.listening(signal.SIGTERM):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match=f"stopped while waiting for process {os.getpid()} in {tiny.root}/run"):
            train(TrainArgs(**tiny.make_flags()), as_teacher=True)


def get_handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("error", [None, ValueError, Stopped("enough"), KeyboardInterrupt])
def test_handlers_are_put_back(error: Any) -> None:
    before = get_handlers()
    try:
        with stopping.listening(*SIGNALS):
            assert all(handler != old for handler, old in zip(get_handlers(), before, strict=True))
            os.kill(os.getpid(), signal.SIGINT)
            assert stopping.is_requested()
            if error:
                raise error
    except BaseException as raised:
        assert error
        assert isinstance(raised, error if isinstance(error, type) else type(error))
    assert get_handlers() == before
    assert not stopping.is_requested()


def test_only_the_signals_that_were_named_are_heard() -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda *args: heard.append(args))
    try:
        with stopping.listening(signal.SIGTERM):
            os.kill(os.getpid(), signal.SIGINT)
            assert not stopping.is_requested()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(heard) == 1


def test_other_threads_hear_nothing() -> None:
    before, seen = get_handlers(), []

    def listen() -> None:
        with stopping.listening(*SIGNALS):
            seen.extend(get_handlers())

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == before


@pytest.mark.parametrize("number", SIGNALS)
def test_exit_status_is_the_signals(number: signal.Signals) -> None:
    with stopping.listening(*SIGNALS):
        os.kill(os.getpid(), number)
        assert Stopped("").exit_status == 128 + number
    with stopping.listening():
        stopping.request()
        assert Stopped("").exit_status == 143


def test_signal_after_a_mere_request_is_the_first() -> None:
    with stopping.listening(signal.SIGTERM):
        stopping.request()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_code_that_never_asks_is_stopped_by_the_first_signal(number: signal.Signals) -> None:
    with stopping.listening(*SIGNALS):
        with pytest.raises(Stopped) as stopped, stopping.raising():
            os.kill(os.getpid(), number)
            time.sleep(600)
        assert stopped.value.exit_status == 128 + number
        # What comes after knows, too.
        with pytest.raises(Stopped), stopping.raising():
            raise AssertionError
