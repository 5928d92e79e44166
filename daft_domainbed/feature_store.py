"""A frozen backbone's features on disk, shared by all jobs of a machine: no view of an image is encoded twice."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from daft_domainbed.checkpoints import hash_state
from daft_domainbed.feature_memory import digest, encode_in_chunks, name_precision

_WAIT = 60.0  # seconds for another job to end its write


class FeatureStore:
    """Features by image, in one database a backbone, which any number of jobs read and write.

    A view that is one of few, such as a shift by whole pixels, soon comes from here alone. A store that cannot be used
    any more (a full disk, a damaged file) is reported once, and everything is encoded as without it.

    Args:
        file: Of the database; made where it is missing.
        warn: Told why the store is not used.
    """

    def __init__(self, file: Path, warn: Callable[[str], None]) -> None:
        self.file, self.warn = file, warn
        self._database: sqlite3.Connection | None = None
        self._try(self._open)

    def recall(self, images: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return features, [B, D], of images, [B, ...], encoding only those that the store does not have.

        Args:
            images: Compared bit for bit, and with the precision that is active.
            encode: Maps images to features, sample by sample independently (a network in evaluation mode).
        """
        keys = digest(images.detach().contiguous().flatten(1).cpu(), name_precision(images))
        found = self._try(lambda: self._read(keys)) or {}
        new = list({key: i for i, key in enumerate(keys) if key not in found}.values())
        encoded = encode_in_chunks(images, new, encode)
        if encoded:
            self._try(lambda: self._write({keys[i]: row for i, row in encoded.items()}))
        rows = found | {keys[i]: row.to(images.device) for i, row in encoded.items()}
        return torch.stack([rows[key].to(images.device) for key in keys])

    def _try(self, action: Callable[[], dict[bytes, Tensor] | None]) -> dict[bytes, Tensor] | None:
        if self._database is None and action != self._open:
            return None
        try:
            return action()
        except (sqlite3.Error, OSError) as error:
            self.warn(f"--feature_cache: {self.file} is not used ({error}): delete it, or choose another folder")
            self._database = None
            return None

    def _open(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(self.file, timeout=_WAIT, isolation_level=None)
        # What a power cut loses is encoded again, so that no job ever waits for the disk.
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE IF NOT EXISTS features (image BLOB PRIMARY KEY, dtype, row BLOB)")

    def _read(self, keys: list[bytes]) -> dict[bytes, Tensor]:
        assert self._database is not None
        found = {}
        for key in dict.fromkeys(keys):
            row = self._database.execute("SELECT dtype, row FROM features WHERE image = ?", (key,)).fetchone()
            if row is not None:
                numbers = torch.from_numpy(np.frombuffer(row[1], dtype=np.uint8).copy())
                found[key] = numbers.view(getattr(torch, row[0]))
        return found

    def _write(self, rows: dict[bytes, Tensor]) -> None:
        assert self._database is not None
        content = [
            (key, str(row.dtype).removeprefix("torch."), row.contiguous().view(torch.uint8).numpy().tobytes())
            for key, row in rows.items()
        ]
        self._database.execute("BEGIN IMMEDIATE")
        self._database.executemany("INSERT OR IGNORE INTO features VALUES (?, ?, ?)", content)
        self._database.execute("COMMIT")


def name_backbone(module: nn.Module) -> str:
    """Return a name for what a frozen backbone computes: of its layers, its weights and what decides on a rounding."""
    parts = [str(module), hash_state(module.state_dict()), torch.__version__, torch.backends.cpu.get_cpu_capability()]
    return sha256("\n".join([*parts, str(torch.get_num_threads())]).encode()).hexdigest()[:16]
