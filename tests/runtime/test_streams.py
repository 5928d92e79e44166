"""Standard streams that are closed, or that know few characters."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from daft_domainbed.cli import main
from daft_domainbed.runtime.streams import mend_streams

CLOSE = """
import os, sys
for number in map(int, sys.argv[1]):
    os.close(number)
sys.stdin, sys.stdout, sys.stderr = (
    None if str(i) in sys.argv[1] else stream for i, stream in enumerate((sys.stdin, sys.stdout, sys.stderr))
)
from daft_domainbed.runtime.streams import mend_streams
mend_streams()
print("to stdout", flush=True)
print("to stderr", file=sys.stderr, flush=True)
with open(sys.argv[2], "w") as file:
    assert file.fileno() > 2
    os.write(1, b"of a library")
    file.write(repr(sys.stdin.read()))
"""


@pytest.mark.parametrize("closed", ["0", "012"])
def test_closed_streams_are_replaced(closed: str, tmp_path: Path) -> None:
    """What is printed, by a library too, goes nowhere, and into no file."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", CLOSE, closed, str(tmp_path / "file")],
        input="typed",
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, (tmp_path / "file").read_text()) == (0, "''")
    assert done.stdout == ("" if "1" in closed else "to stdout\nof a library")
    assert done.stderr == ("" if "2" in closed else "to stderr\n")


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "caf\\xe9 \\u2013"), ("latin-1", "café \\u2013"), ("utf-8", "café –")]
)
def test_every_character_is_printed_somehow(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    mend_streams()
    print("café –", flush=True)
    assert out.getvalue().decode(encoding) == f"{shown}\n"


def test_names_of_files_that_are_no_text_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8"))
    mend_streams()
    print("caf\udce9", flush=True)
    assert out.getvalue() == b"caf\\udce9\n"


def test_a_notebooks_output_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    class Notebook(io.TextIOBase):
        shown = ""

        def write(self, text: str) -> int:
            self.shown += text
            return len(text)

    monkeypatch.setattr(sys, "stdout", notebook := Notebook())
    assert main(["--version"]) == 0
    assert notebook.shown.startswith("daft-domainbed ")
