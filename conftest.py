"""What every test leaves as it found it; one that does not is named, and does not disturb the next.

Here, not in `tests/`, so that it holds for the examples in docstrings, too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest

from tests.states import RANDOM, preserving, read_states, restore_states

# Before torch is imported: numbers depend on the threads, those of the processes that tests start included.
os.environ["OMP_NUM_THREADS"] = "1"
# Else each of the many processes would compile the sources, and the tests' assertions, anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Ray gives its workers the lowest priority, which has them wait for whatever else a machine does.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

# What waits for a disk guards against a power failure, which no test has; a killed process loses nothing by this.
os.fsync = lambda file: None  # type: ignore[assignment]

STATES = pytest.StashKey[dict[str, Any]]()


@pytest.fixture(autouse=True)
def own_states() -> Generator[None]:
    """Have every test draw the same numbers, whatever ran before it, and leave no trace in random states and hosts."""
    from daft_domainbed.runtime.randomness import seed_everything

    with preserving(*RANDOM, "registered hosts", "methods"):
        seed_everything(0)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with those that wait the longest, for services, while the other workers compute."""
    items.sort(key=lambda item: item.path.name not in ("test_slurm.py", "test_ray.py"))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
    """Have what several tests share leave no trace in the one that happens to be the first."""
    if fixturedef.scope == "function":
        return (yield)
    with preserving():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Look before the first fixture."""
    item.stash[STATES] = read_states()
    yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Look after the last fixture."""
    yield
    changes = restore_states(item.stash[STATES])
    if changes:
        pytest.fail(f"left changed by this test or its fixtures: {', '.join(changes)}", pytrace=False)
