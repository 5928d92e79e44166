"""The folder of one run: who owns it, what an interrupted run left in it, and what is written for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daft_domainbed.arguments import TrainArgs, list_differences
from daft_domainbed.errors import UsageError
from daft_domainbed.models import weights
from daft_domainbed.runtime import files
from daft_domainbed.runtime.layout import DONE_FILE, RECORDS_FILE, RESUME_FILE, read_first_record

COLUMN_WIDTH = 12


def read_unfinished(args: TrainArgs, folder: Path) -> dict[str, Any] | None:
    """Return the state of the unfinished run in a folder, or None where there is none.

    Raises:
        UsageError: The folder holds a run with other arguments, or one that cannot be gone on with.
    """
    records, saved = folder / RECORDS_FILE, folder / RESUME_FILE
    if (folder / DONE_FILE).is_file():
        saved.unlink(missing_ok=True)
        first = read_first_record(folder)
        if "args" in first:
            _check_same(first["args"], args, folder, "a finished run")
        return None
    if saved.is_file():
        state = weights.load(saved)
        theirs = state["args"]
        # Where files differ, an image may have been mended before the first step; later, the splits tell more.
        known = theirs if theirs.get("data_id") == args.data_id else theirs | {"data_id": None}
        _check_same(known, args, folder, "an unfinished run")
        return state
    if records.is_file():
        raise UsageError(
            f"{folder} holds records of a run that cannot be gone on with (it has no {RESUME_FILE}): choose another "
            f"--output_dir, or delete it"
        )
    return None


def remove_finished_run(folder: Path) -> None:
    """Forget a finished run, so that it is done again; one that is not finished is left alone."""
    if (folder / DONE_FILE).is_file():
        for name in (RECORDS_FILE, "out.txt", "err.txt", DONE_FILE):  # this one last: a kill before it changes nothing
            (folder / name).unlink(missing_ok=True)


def _check_same(theirs: Mapping[str, Any], args: TrainArgs, folder: Path, what: str) -> None:
    if different := list_differences(theirs, args):
        raise UsageError(
            f"{folder} holds {what} with other arguments ({'; '.join(different)}): choose another --output_dir, or "
            f"delete it"
        )


def keep_records(folder: Path, saved: Mapping[str, Any]) -> None:
    """Drop half-written records and those beyond the resume point; append the one that was about to be written."""
    path = folder / RECORDS_FILE
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    kept = lines[: saved["n_records"]]
    if saved["pending"] is not None:  # the last of them, which a kill may have kept from the file
        kept[saved["n_records"] - 1 :] = [saved["pending"].encode()]
    if len(kept) != saved["n_records"] or not all(map(_is_whole, kept)):
        raise UsageError(f"{path} has lost records that the run in {folder} had written: choose another --output_dir")
    with files.writing_atomically(path) as file:
        file.write(b"".join(line + b"\n" for line in kept))


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


class Log:
    """Rows of numbers to standard output and out.txt, everything else to standard error and err.txt."""

    def __init__(self, folder: Path, *, quiet: bool) -> None:
        self.folder, self.quiet = folder, quiet

    def write(self, text: str) -> None:
        """Write a result."""
        if not self.quiet:
            print(text, flush=True)
        self._append("out.txt", text)

    def warn(self, text: str) -> None:
        """Write what is no result."""
        print(text, file=sys.stderr, flush=True)
        self._append("err.txt", text)

    def note(self, text: str) -> None:
        """Write what a sweep says once for all its jobs, so that a job of one says it to its files only."""
        if text:
            self._append("err.txt", text) if self.quiet else self.warn(text)

    def _append(self, name: str, text: str) -> None:
        with (self.folder / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")


def format_row(row: Sequence[Any]) -> str:
    """Return numbers and names in DomainBed's columns."""
    cells = [f"{value:.10f}" if isinstance(value, float) else str(value) for value in row]
    return "  ".join(cell.ljust(COLUMN_WIDTH)[:COLUMN_WIDTH] for cell in cells)
