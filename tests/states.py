"""What all tests of a process share: how it is read, compared and put back."""

from __future__ import annotations

import functools
import gc
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

RANDOM = ("random's state", "NumPy's random state", "torch's random state")
# Variables that pytest sets for each test, and some that libraries set whenever they are imported.
_NOT_OURS = ("PYTEST_CURRENT_TEST", "KMP_", "TORCHINDUCTOR_", "TOKENIZERS_", "OUTDATED_")


class Shared(NamedTuple):
    """Something that all tests share."""

    read: Callable[[], Any]
    restore: Callable[[Any], object]


@functools.cache
def list_shared() -> dict[str, Shared]:
    """Return what is shared by its name; the process that only distributes the tests never imports it."""
    import numpy as np
    import torch

    return {
        "torch's threads": Shared(torch.get_num_threads, torch.set_num_threads),
        "signal handlers": Shared(_read_handlers, _restore_handlers),
        "the environment": Shared(_read_environment, _restore_environment),
        "threads": Shared(_read_threads, _end_threads),
        "the working directory": Shared(os.getcwd, os.chdir),
        "random's state": Shared(random.getstate, random.setstate),
        "NumPy's random state": Shared(lambda: np.random.get_state(legacy=False), np.random.set_state),
        "torch's random state": Shared(torch.get_rng_state, torch.set_rng_state),
        "registered hosts": Shared(_read_hosts, _restore_hosts),
        "methods": Shared(_read_methods, _restore_methods),
    }


def read_states() -> dict[str, Any]:
    """Return all that is shared as it is now."""
    return {name: shared.read() for name, shared in list_shared().items()}


def restore_states(before: dict[str, Any]) -> list[str]:
    """Put back what has changed, and return what that was."""
    changes = []
    for name, state in before.items():
        now = list_shared()[name].read()
        if name == "threads":
            now = _wait_for_threads(state, now)
        if not _is_same(state, now):
            list_shared()[name].restore(state)
            changes.append(name + _describe(state, now))
    return changes


@contextmanager
def preserving(*names: str) -> Iterator[None]:
    """Leave what is named, or all that is shared, as it was before the block."""
    before = {name: shared.read() for name, shared in list_shared().items() if not names or name in names}
    try:
        yield
    finally:
        restore_states(before)


def _is_same(before: Any, now: Any) -> bool:
    if isinstance(before, frozenset):
        return bool(now <= before)
    if isinstance(before, dict):
        return before.keys() == now.keys() and all(_is_same(before[name], now[name]) for name in before)
    return bool((before == now).all()) if hasattr(before, "all") else bool(before == now)


def _describe(before: Any, now: Any) -> str:
    """Return what has changed, where that can be read."""
    if isinstance(before, frozenset):
        return f" ({', '.join(thread.name for thread in now - before)})"
    if isinstance(before, int | str):
        return f" ({before} before, {now} now)"
    if isinstance(before, dict) and "bit_generator" not in before:
        changed = [name for name in before | now if before.get(name) != now.get(name)]
        return f" ({', '.join(map(str, changed))})"
    return ""


def _read_handlers() -> dict[int, Any]:
    # torch keeps one of its own once it has had worker processes.
    numbers = signal.valid_signals() - {signal.SIGCHLD}
    return {number: signal.getsignal(number) for number in numbers}


def _restore_handlers(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _read_threads() -> frozenset[threading.Thread]:
    # A thread that Python did not start never ends for Python; the others are their process's for good.
    return frozenset(
        thread
        for thread in threading.enumerate()
        if not isinstance(thread, threading._DummyThread) and not thread.name.startswith(("images", "tqdm_"))
    )


def _wait_for_threads(before: frozenset[threading.Thread], now: frozenset[threading.Thread]) -> Any:
    """Return the threads that are left once those that are about to end have, with what nobody holds any more."""
    if left := now - before:
        gc.collect()
        for thread in left:
            thread.join(2)
    return _read_threads()


def _end_threads(before: frozenset[threading.Thread]) -> None:
    """Nothing ends a thread."""


def _read_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)}


def _restore_environment(before: dict[str, str]) -> None:
    for name in _read_environment().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _read_hosts() -> dict[str, Any]:
    from daft_domainbed.plugin.registry import REGISTRY

    return {name: entry.host for name, entry in REGISTRY.hosts.items()}


def _read_methods() -> dict[str, Any]:
    from daft_domainbed.methods import METHODS

    return METHODS.copy()


def _restore_methods(before: dict[str, Any]) -> None:
    from daft_domainbed.methods import METHODS
    from daft_domainbed.plugin.defaults import list_plain_pairs
    from daft_domainbed.plugin.registry import REGISTRY

    METHODS.clear()
    METHODS.update(before)
    REGISTRY.added[:] = [name for name in REGISTRY.added if name in before]
    list_plain_pairs.cache_clear()


def _restore_hosts(before: dict[str, Any]) -> None:
    from daft_domainbed import plugin

    for name, host in _read_hosts().items():
        if name not in before:
            plugin.unregister(host)
    for host in before.values():
        plugin.register(host)
