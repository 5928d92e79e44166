"""A folder has one owner at a time, who loses it by dying and not before."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest

from daft_domainbed.runtime import locks
from daft_domainbed.runtime.locks import LOCK_FILE, Claimed, TakenOver, claim, is_claimed
from tests.conftest import Shelf

Outcome = Callable[[Path], dict[str, str]]

# Claims each folder that it is told of, says how that went, and leaves it at the next line.
TAKER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from daft_domainbed.runtime import locks
for line in sys.stdin:
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.claim(Path(line.strip())))
        except locks.Claimed as error:
            print(error.owner, flush=True)
        else:
            print("won", flush=True)
        sys.stdin.readline()
    print("left", flush=True)
"""


class Taker:
    """Another process."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", TAKER]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self.process.stdin and self.process.stdout
        self.input: IO[str] = self.process.stdin
        self.output: IO[str] = self.process.stdout

    def tell(self, line: object = "") -> None:
        self.input.write(f"{line}\n")
        self.input.flush()

    def hear(self) -> str:
        return self.output.readline().strip()

    def ask(self, line: object = "") -> str:
        self.tell(line)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start_taker() -> Iterator[Callable[[], Taker]]:
    """Starts other processes, which end with the test."""
    started: list[Taker] = []

    def start() -> Taker:
        started.append(Taker())
        return started[-1]

    yield start
    for taker in started:
        taker.kill()
        with taker.output, suppress(BrokenPipeError), taker.input:
            pass


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has none."""

    def refuse(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def write_lock(folder: Path, content: object, age: float = 0.0) -> Path:
    """Leave the lock of another owner, whose last sign of life was so many seconds ago."""
    path = folder / LOCK_FILE
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    os.utime(path, (time.time() - age,) * 2)
    return path


HERE = {"machine": locks._name_machine(), "host": "here", "pid": 4}
ELSEWHERE = {"machine": "another", "host": "node7", "pid": 12}
DEAD = 2 * locks.SECONDS_UNTIL_DEAD
ALIVE = locks.SECONDS_UNTIL_DEAD / 2


def list_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- one owner -------------------------------------------------------------------------------------------------------


def test_another_process_is_kept_out_until_the_owner_leaves(tmp_path: Path, start_taker: Callable[[], Taker]) -> None:
    owner = start_taker()
    assert owner.ask(tmp_path) == "won"
    assert is_claimed(tmp_path)
    says = f"process {owner.process.pid} is at work in {tmp_path}: wait for it, or choose another --output_dir"
    with pytest.raises(Claimed, match=says), claim(tmp_path):
        pass
    assert owner.ask() == "left"
    assert not is_claimed(tmp_path)
    with claim(tmp_path):
        assert owner.ask(tmp_path) == f"process {os.getpid()}"
    assert list_files(tmp_path) == []


def test_killed_owners_folder_is_free_at_once(
    tmp_path: Path, start_taker: Callable[[], Taker], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = start_taker()
    owner.ask(tmp_path)
    owner.kill()
    assert list_files(tmp_path) == [LOCK_FILE]
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    assert not is_claimed(tmp_path)
    with claim(tmp_path) as claimed:
        claimed.check()
        assert is_claimed(tmp_path)
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list_files(tmp_path) == []


def test_nothing_is_left_where_the_block_fails(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ValueError), claim(tmp_path):
        raise ValueError
    assert list_files(tmp_path) == []
    assert threading.active_count() == before


def test_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", fail)
        with pytest.raises(OSError, match="No space left"), claim(tmp_path):
            pass
    assert list_files(tmp_path) == []
    with claim(tmp_path):
        pass


def test_folder_that_is_not_there_is_nobodys(tmp_path: Path) -> None:
    assert not is_claimed(tmp_path)
    assert not is_claimed(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError), claim(tmp_path / "nowhere"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a while")
def test_owner_is_seen_by_who_may_only_read() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        with claim(folder):
            os.seteuid(65534)
            try:
                assert is_claimed(folder)
            finally:
                os.seteuid(0)


# --- other machines --------------------------------------------------------------------------------------------------


def test_owner_on_another_machine_is_respected_while_it_gives_signs_of_life(tmp_path: Path) -> None:
    lock = write_lock(tmp_path, ELSEWHERE, age=ALIVE)
    before = lock.read_bytes(), lock.stat().st_mtime_ns
    assert is_claimed(tmp_path)
    with pytest.raises(Claimed, match="process 12 on node7 is at work"), claim(tmp_path):
        pass
    assert (lock.read_bytes(), lock.stat().st_mtime_ns) == before
    assert list_files(tmp_path) == [LOCK_FILE]


def test_owner_on_another_machine_is_taken_for_dead_once_it_gives_none(tmp_path: Path) -> None:
    write_lock(tmp_path, ELSEWHERE, age=DEAD)
    assert not is_claimed(tmp_path)
    with claim(tmp_path) as claimed:
        claimed.check()
        assert json.loads((tmp_path / LOCK_FILE).read_text())["machine"] == HERE["machine"]
        assert is_claimed(tmp_path)
    assert list_files(tmp_path) == []


def test_a_wrong_clock_kills_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lock(tmp_path, ELSEWHERE, age=ALIVE)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10 * DEAD)
    assert is_claimed(tmp_path)
    with pytest.raises(Claimed), claim(tmp_path):
        pass


def test_owner_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_BEATS", 0.01)
    with claim(tmp_path):
        for _ in range(2):
            os.utime(tmp_path / LOCK_FILE, (0, 0))
            deadline = time.monotonic() + 60
            while not (tmp_path / LOCK_FILE).stat().st_mtime:
                assert time.monotonic() < deadline
                time.sleep(0.001)


def test_without_locks_the_file_itself_keeps_others_out(tmp_path: Path, without_locks: None) -> None:
    with claim(tmp_path) as claimed:
        assert is_claimed(tmp_path)
        with pytest.raises(Claimed, match=f"process {os.getpid()} is at work"), claim(tmp_path):
            pass
        claimed.check()
    assert not is_claimed(tmp_path)
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("owner", [HERE, ELSEWHERE], ids=["here", "elsewhere"])
def test_without_locks_signs_of_life_are_all_that_counts(
    tmp_path: Path, without_locks: None, owner: dict[str, Any]
) -> None:
    write_lock(tmp_path, owner, age=ALIVE)
    assert is_claimed(tmp_path)
    with pytest.raises(Claimed), claim(tmp_path):
        pass
    write_lock(tmp_path, owner, age=DEAD)
    assert not is_claimed(tmp_path)
    with claim(tmp_path) as claimed:
        claimed.check()
    assert list_files(tmp_path) == []


GARBAGE = [b"", b"4711", b"garbage", b"\xff\xfe", b"[]", b'{"machine"', b"[" * 100, b'{"machine": 3}']


@pytest.mark.parametrize("content", GARBAGE)
def test_lock_that_says_nothing_of_its_owner_is_judged_by_its_age(tmp_path: Path, content: bytes) -> None:
    """It may be one that is about to be written."""
    write_lock(tmp_path, content, age=ALIVE)
    assert is_claimed(tmp_path)
    with pytest.raises(Claimed, match="process .*is at work"), claim(tmp_path):
        pass
    write_lock(tmp_path, content, age=DEAD)
    assert not is_claimed(tmp_path)
    with claim(tmp_path) as claimed:
        claimed.check()
    assert list_files(tmp_path) == []


# --- at once ---------------------------------------------------------------------------------------------------------

LEFT: dict[str, tuple[object, float] | None] = {
    "nothing": None,
    "a lock of here": (HERE, 0.0),
    "a lock of elsewhere": (ELSEWHERE, DEAD),
    "an empty lock": (b"", DEAD),
}


def take(folder: Path, barrier: threading.Barrier, ends: list[str]) -> None:
    """Claim a folder at the same time as others, and leave it when all have tried."""
    barrier.wait()
    try:
        with claim(folder) as claimed:
            barrier.wait()
            try:
                claimed.check()  # without locks, one that was pushed aside finds out before it writes
                ends.append("won")
            except TakenOver:
                ends.append("taken over")
            barrier.wait()
    except Claimed:
        barrier.wait()
        ends.append("lost")
        barrier.wait()


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("has_locks", [True, False], ids=["with locks", "without locks"])
def test_of_several_threads_exactly_one_wins(
    tmp_path: Path, quick_switches: None, request: pytest.FixtureRequest, left: str, has_locks: bool
) -> None:
    if not has_locks:
        request.getfixturevalue("without_locks")
    for i in range(40):
        folder = tmp_path / str(i)
        folder.mkdir()
        if (lock := LEFT[left]) is not None:
            content, age = lock
            write_lock(folder, content, age if has_locks else DEAD)
        barrier = threading.Barrier(4)
        ends: list[str] = []
        threads = [threading.Thread(target=take, args=(folder, barrier, ends)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ends.count("won") == 1, ends
        assert len(ends) == 4
        assert not has_locks or "taken over" not in ends
        assert list_files(folder) == []


@pytest.mark.parametrize("left", LEFT)
def test_of_several_processes_exactly_one_wins(tmp_path: Path, start_taker: Callable[[], Taker], left: str) -> None:
    takers = [start_taker() for _ in range(3)]
    for i in range(30):
        folder = tmp_path / str(i)
        folder.mkdir()
        if (lock := LEFT[left]) is not None:
            write_lock(folder, *lock)
        for taker in takers:
            taker.tell(folder)
        answers = [taker.hear() for taker in takers]
        assert answers.count("won") == 1, answers
        assert all(answer == "won" or "process" in answer for answer in answers)
        assert [taker.ask() for taker in takers] == ["left"] * 3
        assert list_files(folder) == []


@pytest.mark.parametrize("has_locks", [True, False], ids=["with locks", "without locks"])
def test_who_takes_over_a_little_earlier_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, has_locks: bool
) -> None:
    """Between the other one's judging the old owner dead and its acting on it."""
    if not has_locks:
        request.getfixturevalue("without_locks")
    lock = write_lock(tmp_path, ELSEWHERE, age=DEAD)
    rename, inodes = Path.rename, []

    def be_late(self: Path, target: Path) -> Path:
        if not inodes:
            lock.unlink()
            inodes.append(write_lock(tmp_path, {"machine": "a third", "host": "node8", "pid": 5}).stat().st_ino)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", be_late)
    with pytest.raises(Claimed, match="process 5 on node8 is at work"), claim(tmp_path):
        pass
    assert [lock.stat().st_ino] == inodes
    assert list_files(tmp_path) == [LOCK_FILE]


def look_for(seconds: float, path: Path) -> threading.Thread:
    """Hold a lock as one that only looks does, for longer than it would."""
    file = path.open()
    fcntl.flock(file, fcntl.LOCK_SH)
    timer = threading.Timer(seconds, file.close)
    timer.start()
    return timer


def test_who_only_looks_makes_no_claim_fail(tmp_path: Path) -> None:
    """Here on a dead owner's lock, for as long as a busy machine may keep a process from going on."""
    timer = look_for(0.3, write_lock(tmp_path, HERE))
    with claim(tmp_path) as claimed:
        claimed.check()
    timer.join()


def test_who_looks_between_the_making_and_the_locking_makes_no_claim_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, looks = fcntl.flock, []

    def look_first(file: IO[str], kind: int) -> None:
        if not looks:
            monkeypatch.undo()
            looks.append(look_for(0.3, tmp_path / LOCK_FILE))
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", look_first)
    with claim(tmp_path) as claimed:
        claimed.check()
    looks[0].join()


@pytest.mark.parametrize("n_claims", [15, pytest.param(200, marks=[pytest.mark.long, pytest.mark.slow])])
def test_many_looks_make_no_claim_fail(tmp_path: Path, quick_switches: None, n_claims: int) -> None:
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            is_claimed(tmp_path)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(n_claims):
            with claim(tmp_path) as claimed:
                claimed.check()
            write_lock(tmp_path, HERE)  # as if it had been killed
    finally:
        over.set()
        for thread in threads:
            thread.join()


# --- taken over ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_owner_that_was_taken_for_dead_writes_no_more(tiny: Any, outcome: Outcome, step: int, shelf: Shelf) -> None:
    run = tiny.root / "stopped" / "run"
    files: dict[str, bytes] = {}

    def read_files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.iterdir()}

    def lose(done: int, n_steps: int) -> None:
        if done == step:
            (run / LOCK_FILE).unlink()
            write_lock(run, ELSEWHERE)
            files.update(read_files())
        assert done <= step + 1

    with pytest.raises(TakenOver, match=f"{run} was taken over by another process, .* that one goes on"):
        tiny.train("stopped/run", on_step=lose)
    assert read_files() == files
    (run / LOCK_FILE).unlink()
    tiny.train("stopped/run")
    assert outcome(tiny.root / "stopped") == shelf.read()
