"""Threads that read images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from daft_domainbed.data.readers import Readers


def test_what_is_read_comes_in_order_and_errors_come_through() -> None:
    with Readers(3) as readers:
        assert list(readers.map(lambda x: x * x, range(50))) == [x * x for x in range(50)]
        with pytest.raises(ZeroDivisionError):
            list(readers.map(lambda x: 1 // x, [1, 0]))


def test_a_reader_that_hangs_does_not_outlive_its_process() -> None:
    """Those of the standard library are waited for when the interpreter ends, for ever."""
    code = (
        "import threading; from daft_domainbed.data.readers import Readers; begun = threading.Event()\n"
        "Readers(2).submit(lambda: (begun.set(), threading.Event().wait())); begun.wait(); print('over')"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr
