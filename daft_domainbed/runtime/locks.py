"""Who is at work in a folder: a claim that ends as soon as its owner has died, on whatever machine.

The operating system lets go of a dead process's lock by itself, at once. Where a file system keeps locks to each
machine (Lustre's localflock) or has none, the owner's heartbeat tells: the file's time, renewed while the owner lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any
from uuid import uuid4

from daft_domainbed.errors import DISK_FULL, RunError, UsageError
from daft_domainbed.runtime import stopping

LOCK_FILE = ".lock"
SECONDS_BETWEEN_BEATS = 10.0
SECONDS_UNTIL_DEAD = 60.0
_TRIES = 250  # somebody who only looks holds the lock for an instant


class Claimed(UsageError):
    """Another process is at work in the folder."""

    def __init__(self, folder: Path, owner: str) -> None:
        super().__init__(f"{owner} is at work in {folder}: wait for it, or choose another --output_dir")
        self.owner = owner


class TakenOver(RunError):
    """Another process was given the folder, because this one was out of touch for too long."""


class Claim:
    """A folder that belongs to this process, as long as no other has taken it for dead.

    Attributes:
        path: The lock file.
        file: The same file, open and locked.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self.file = path, file

    def check(self) -> None:
        """Make sure of the claim before anything is written.

        Raises:
            TakenOver: Another process has taken the folder over.
        """
        if not _is_same_file(self.file, self.path):
            raise TakenOver(
                f"{self.path.parent} was taken over by another process, which this one, out of touch for more than "
                f"{SECONDS_UNTIL_DEAD:.0f} s, was dead to: that one goes on"
            )


@contextmanager
def claim(folder: Path) -> Iterator[Claim]:
    """Claim a folder until the end of the block or of this process.

    Raises:
        Claimed: Another process has it.
        OSError: The folder cannot be written.
    """
    owned = Claim(folder / LOCK_FILE, _lock(folder / LOCK_FILE))
    is_over = threading.Event()
    beat = threading.Thread(target=_beat, args=(owned.file, is_over), daemon=True)
    beat.start()
    try:
        yield owned
    finally:
        is_over.set()
        beat.join()
        with suppress(OSError):
            if _is_same_file(owned.file, owned.path):
                owned.path.unlink()
        owned.file.close()


@contextmanager
def claim_in_turn(folder: Path, on_wait: Callable[[Claimed], None]) -> Iterator[Claim]:
    """Claim a folder as soon as no other process has it.

    Args:
        folder: The folder; it has to exist.
        on_wait: Called five times a second with what says who has it; what it raises ends the wait.

    Raises:
        OSError: The folder cannot be written.
    """
    with ExitStack() as stack:
        while True:
            try:
                owned = stack.enter_context(claim(folder))
                break
            except Claimed as error:
                on_wait(error)
                time.sleep(0.2)
        yield owned


@contextmanager
def acquire(folder: Path, *, wait: bool) -> Iterator[Claim]:
    """Claim a folder for what a command writes there, with messages of its flags.

    Args:
        folder: It has to exist.
        wait: Whether to wait for a process that has it, and say so once; else it is refused.

    Raises:
        Claimed: Another process has it, and `wait` is false.
        Stopped: This process was asked to stop while it waited.
        UsageError: The folder cannot be written.
        OSError: The disk is full.
    """
    told = False

    def on_wait(error: Claimed) -> None:
        nonlocal told
        if not wait:
            raise error
        if not told:
            print(f"waiting for {error.owner}, which is at work in {folder}", file=sys.stderr, flush=True)
            told = True
        if stopping.is_requested():
            raise stopping.Stopped(f"stopped while waiting for {error.owner} in {folder}") from None

    with ExitStack() as stack:
        try:
            claim = stack.enter_context(claim_in_turn(folder, on_wait))
        except OSError as error:
            raise explain_unwritable(folder, error) from error
        yield claim


def explain_unwritable(folder: Path, error: OSError) -> Exception:
    """Return what to raise where a folder cannot be written: the disk's own error where that is full."""
    if error.errno in DISK_FULL:  # no fault of the folder's
        return error
    return UsageError(f"--output_dir {folder} cannot be written ({error.strerror}): choose another")


def is_claimed(folder: Path) -> bool:
    """Return whether a living process has claimed a folder."""
    try:
        with (folder / LOCK_FILE).open() as file:
            locked = _try_lock(file, fcntl.LOCK_SH)
            return locked is False or _may_live(file, folder, locked)
    except OSError:
        return False


def _lock(path: Path) -> IO[str]:
    """Return the lock file, locked, with this process's name in it."""
    tries = 0
    while True:
        with suppress(FileExistsError):
            return _create(path)
        try:
            file = path.open("r+")
        except FileNotFoundError:  # its owner has just removed it
            continue
        with file:
            locked = _try_lock(file, fcntl.LOCK_EX)
            if locked is False and tries < _TRIES and _try_lock(file, fcntl.LOCK_SH):
                fcntl.flock(file, fcntl.LOCK_UN)  # or two of us would keep each other out while they sleep
                tries += 1
                time.sleep(random.uniform(0.005, 0.03))
            elif locked is False or (_is_same_file(file, path) and _may_live(file, path.parent, locked)):
                raise Claimed(path.parent, _describe(_read_owner(file)))
            elif _is_same_file(file, path):
                _remove_dead(file, path)


def _create(path: Path) -> IO[str]:
    """Make the lock file; whoever finds it before it is locked and has a name in it takes its owner to be alive."""
    file = path.open("x+")
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)  # waits for those who only look
        json.dump({"machine": _name_machine(), "host": platform.node(), "pid": os.getpid()}, file)
        file.flush()
    except BaseException:  # a full disk
        path.unlink(missing_ok=True)
        with suppress(OSError):  # it tries once more to write
            file.close()
        raise
    return file


def _try_lock(file: IO[str], kind: int) -> bool | None:
    """Return whether the file could be locked, or None where the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read_owner(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    where = "" if owner.get("machine") == _name_machine() else f" on {owner.get('host')}"
    return f"process {owner.get('pid')}{where}"


def _may_live(file: IO[str], folder: Path, locked: bool | None) -> bool:
    """Return whether the owner may be alive although its lock, if it had one, was no hindrance."""
    if locked and _read_owner(file).get("machine") == _name_machine():
        return False
    return _is_beating(file, folder)


def _is_beating(file: IO[str], folder: Path) -> bool:
    # By the clock of the file system: machines' own may differ.
    with TemporaryFile(dir=folder) as probe:
        now = os.fstat(probe.fileno()).st_mtime
    return now - os.fstat(file.fileno()).st_mtime < SECONDS_UNTIL_DEAD


def _is_same_file(file: IO[str], path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), there)


def _remove_dead(file: IO[str], path: Path) -> None:
    """Remove a dead process's lock, unless another process was quicker and has put its own there."""
    aside = path.with_name(f".{uuid4().hex}.tmp")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if not _is_same_file(file, aside):
            with suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _beat(file: IO[str], is_over: threading.Event) -> None:
    while not is_over.wait(SECONDS_BETWEEN_BEATS):
        with suppress(OSError):
            os.utime(file.fileno())


@cache
def _name_machine() -> str:
    """Return what is the same for all processes of one running kernel, in containers too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
