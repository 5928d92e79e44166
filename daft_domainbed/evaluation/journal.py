"""What an evaluation has found so far, on disk: one line a finding, so that it goes on wherever it was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daft_domainbed.errors import UsageError
from daft_domainbed.runtime.layout import JOURNAL_FILE
from daft_domainbed.runtime.locks import acquire


@contextmanager
def open_journal(folder: Path, settings: Mapping[str, Any], what: str = "an evaluation") -> Iterator[Journal]:
    """Make a folder where there is none, claim it, and open its journal.

    Raises:
        UsageError: There is a file in its place, or `Journal` refuses it.
        Claimed: Another process is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--output_dir {folder} is a file, not a folder: choose another") from error
    with acquire(folder, wait=False), Journal(folder, settings, what) as journal:
        yield journal


class Journal:
    """The findings of an evaluation in its folder, by name; the first line holds the settings that they rest on.

    Args:
        folder: Of the evaluation, claimed by this process.
        settings: JSON; a folder that was begun with others is refused.
        what: Whose findings they are, for messages.

    Raises:
        UsageError: The folder holds an evaluation with other settings, or a damaged one.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], what: str = "an evaluation") -> None:
        self.path = folder / JOURNAL_FILE
        self.findings: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.peak = 0.0
        self.machine: Any = None  # that found the last of what is there
        text = self.path.read_bytes() if self.path.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]  # a killed process may have left a part of a line
        lines = [self._parse(line) for line in whole.splitlines()]
        if lines:
            _compare(lines[0].get("settings"), json.loads(json.dumps(settings)), folder, what)
        self.file = self.path.open("r+b" if self.path.is_file() else "wb")
        self.file.truncate(len(whole))
        self.file.seek(0, os.SEEK_END)
        for line in lines[1:]:
            self._keep(line)
        if not lines:
            self._write({"settings": settings})

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.file.close()

    def put(self, name: str, finding: Any, seconds: float, peak: float, machine: Any) -> None:
        """Write a finding down for good, with its cost: wall seconds, the process's most memory in MB, the machine."""
        if machine != self.machine:
            self._write({"machine": machine})
            self._keep({"machine": machine})
        line = {"name": name, "finding": finding, "seconds": round(seconds, 3), "peak_mb": round(peak, 1)}
        self._write(line)
        self._keep(json.loads(json.dumps(line)))  # as another process would read it

    def _keep(self, line: dict[str, Any]) -> None:
        if "machine" in line:
            self.machine = line["machine"]
            return
        self.findings[line["name"]] = line["finding"]
        self.seconds[line["name"]] = line["seconds"]
        self.peak = max(self.peak, line["peak_mb"])

    def _write(self, line: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(line)
            if (
                "settings" in parsed
                or "machine" in parsed
                or {"name", "finding", "seconds", "peak_mb"} <= parsed.keys()
            ):
                return dict(parsed)
        except (ValueError, TypeError, AttributeError):
            pass
        raise UsageError(f"{self.path} is damaged: delete it, or choose another --output_dir")


def _compare(theirs: Any, ours: Mapping[str, Any], folder: Path, whose: str) -> None:
    """Refuse to mix two of them, naming the first setting in which they differ."""
    if not isinstance(theirs, dict):
        raise UsageError(f"{folder / JOURNAL_FILE} does not begin with settings: delete it")
    for name, value in ours.items():
        if theirs.get(name) == value:
            continue
        if name in ("weights", "against", "images", "outside"):
            what = {
                "weights": "a checkpoint with other weights",
                "against": "another set of checkpoints",
                "images": "other images: the data have changed since",
                "outside": "other outside images: they have changed since, or two sets have one name",
            }[name]
            raise UsageError(f"{folder} holds {whose} of {what}: choose another --output_dir")
        raise UsageError(
            f"{folder} holds {whose} with {name} {theirs.get(name)}, not {value}: choose another --output_dir"
        )
