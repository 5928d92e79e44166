"""A frozen backbone's features on disk, shared by all jobs of a machine: no view of an image is encoded twice."""

from __future__ import annotations

import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from daft_domainbed._version import __version__
from daft_domainbed.models.feature_memory import FeatureMemory, digest, encode_in_chunks, name_precision
from daft_domainbed.models.weights import hash_state

_WAIT = 60.0  # seconds for another job to end its write
_FREE = 2**31  # bytes of the disk that are left to others


class FeatureStore:
    """Features by image, in one database a backbone, which any number of jobs read and write.

    A view that is one of few, such as a shift by whole pixels, soon comes from here alone. What cannot be used (a
    locked file, a damaged one) is reported once, and the run goes on with a memory of its own. A row that is damaged
    is encoded again, and no row is added while less than 2 GiB of the disk are free.

    Args:
        file: The database's; made where it is missing.
        warn: Called with a message that says why the store is not used.
    """

    def __init__(self, file: Path, warn: Callable[[str], None]) -> None:
        self.file, self.warn = file, warn
        self._memory = FeatureMemory()
        self._database: sqlite3.Connection | None = None
        try:
            self._database = _open(file)
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def recall(self, images: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return features, [B, D], of images, [B, ...], encoding only those that the store does not have.

        On an accelerator encoding is quicker than looking up, so everything is encoded.

        Args:
            images: Compared bit for bit, and with the precision that is active.
            encode: Maps images to features, sample by sample independently (a network in evaluation mode).
        """
        if self._database is None or images.device.type != "cpu":
            return self._memory.recall(images, encode)
        keys = digest(images.detach().contiguous().flatten(1), name_precision(images))
        try:
            found = _read(self._database, keys)
            new = list({key: i for i, key in enumerate(keys) if key not in found}.values())
            encoded = {keys[i]: row for i, row in encode_in_chunks(images, new, encode).items()}
            if encoded and shutil.disk_usage(self.file.parent).free > _FREE:
                _write(self._database, encoded)
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
            return self._memory.recall(images, encode)
        rows = found | encoded
        return torch.stack([rows[key] for key in keys])

    def _give_up(self, error: Exception) -> None:
        self._database = None
        self.warn(f"--feature_cache: {self.file} is not used by this run ({error}): choose another folder")


def _open(file: Path) -> sqlite3.Connection:
    file.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(file, timeout=_WAIT, isolation_level=None)
    end = time.monotonic() + _WAIT
    while True:  # this statement alone does not wait for others by itself
        try:
            # With a log written ahead nobody waits for the disk, and a power cut loses the latest rows at most.
            database.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute("CREATE TABLE IF NOT EXISTS features (image BLOB PRIMARY KEY, dtype TEXT, row BLOB, sum BLOB)")
    return database


def _read(database: sqlite3.Connection, keys: list[bytes]) -> dict[bytes, Tensor]:
    found = {}
    for key in dict.fromkeys(keys):
        entry = database.execute("SELECT dtype, row, sum FROM features WHERE image = ?", (key,)).fetchone()
        if entry is not None and _sum(*entry[:2]) == entry[2]:
            numbers = torch.from_numpy(np.frombuffer(entry[1], dtype=np.uint8).copy())
            found[key] = numbers.view(getattr(torch, entry[0]))
    return found


def _write(database: sqlite3.Connection, rows: dict[bytes, Tensor]) -> None:
    entries = []
    for key, row in rows.items():
        dtype, content = str(row.dtype).removeprefix("torch."), row.contiguous().view(torch.uint8).numpy().tobytes()
        entries.append((key, dtype, content, _sum(dtype, content)))
    database.execute("BEGIN IMMEDIATE")
    database.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?)", entries)
    database.execute("COMMIT")


def _sum(dtype: object, row: object) -> bytes:
    return blake2b(f"{dtype} ".encode() + (row if isinstance(row, bytes) else b""), digest_size=8).digest()


def name_backbone(module: nn.Module) -> str:
    """Return a name for what a frozen backbone computes."""
    return name_layers(str(module), module.state_dict())


def name_layers(layers: str, state: Mapping[str, Tensor]) -> str:
    """Return a name for what layers compute: a hash of their repr, weights and all that decides on rounding."""
    libraries = [f"{name} {sys.modules[name].__version__}" for name in ("timm", "torchvision") if name in sys.modules]
    versions = [__version__, torch.__version__, *libraries, torch.backends.cpu.get_cpu_capability()]
    parts = [layers, hash_state(state), *versions, str(torch.get_num_threads())]
    return sha256("\n".join(parts).encode()).hexdigest()[:16]
