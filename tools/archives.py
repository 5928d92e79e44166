"""Records in one compressed file: the same bytes for the same records, wherever and whenever they are packed."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_archive(contents: Mapping[str, bytes], archive: Path) -> None:
    """Write files by name, sorted, into an archive (`.tar.xz`) whose bytes depend on nothing else."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in sorted(contents.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive.parent.mkdir(parents=True, exist_ok=True)
    archive.write_bytes(lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME))


@contextmanager
def open_archive(archive: Path) -> Iterator[Path]:
    """Unpack an archive into a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of lines of JSON (`.jsonl.xz`); none where there is no file."""
    if not path.is_file():
        return []
    with lzma.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def add_records(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write records after those that are there."""
    everything = [*read_records(path), *records]
    with lzma.open(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in everything)
