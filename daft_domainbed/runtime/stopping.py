"""Stopping in good order: the first signal lets a run save itself, the second one does not wait for that."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """A run was asked to stop and has saved where it is; the same command goes on from there."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + (_requested or signal.SIGTERM)  # what shells report


_requested: int | None = None
_has_heard = False  # a signal; one that comes after a mere request is still the first
_is_raising = False


@contextmanager
def listening(*signals: int) -> Iterator[None]:
    """Have these signals ask the run of this process to stop, until the end of the block."""
    global _requested, _has_heard
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody listen
        yield
        return
    _requested, _has_heard = None, False
    before = {number: signal.signal(number, _hear) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested, _has_heard = None, False


@contextmanager
def raising() -> Iterator[None]:
    """Have the first signal already end the block, where code runs that never asks `is_requested`."""
    global _is_raising
    if is_requested():
        raise Stopped("stopped before any more jobs were launched; the same command goes on")
    _is_raising = True
    try:
        yield
    finally:
        _is_raising = False


def request(number: int = signal.SIGTERM) -> None:
    """Ask the run of this process to save itself after the current step and to raise `Stopped`."""
    global _requested
    _requested = number


def is_requested() -> bool:
    """Return whether the run of this process was asked to stop."""
    return _requested is not None


def _hear(number: int, frame: FrameType | None) -> None:
    global _has_heard
    if not _has_heard:
        _has_heard = True
        request(number)
        if _is_raising:
            raise Stopped("stopped; jobs that were launched may go on by themselves, the same command does the rest")
        return
    signal.signal(number, signal.SIG_DFL)  # should even this take too long, a third one ends it
    raise KeyboardInterrupt
