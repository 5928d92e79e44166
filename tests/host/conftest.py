"""The two hosts, and small files in the layouts that both read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from daft_domainbed import plugin
from daft_domainbed.host import contract

NO_CLONE = "DOMAINBED_ROOT is not set: no clone of DomainBed to compare with"


@pytest.fixture(scope="session")
def clone() -> Iterator[str]:
    """The user's clone of DomainBed, which stays byte for byte as it was."""
    root = os.environ.get("DOMAINBED_ROOT")
    if not root:
        pytest.skip(NO_CLONE)
    before = hash_files(Path(root))
    yield root
    assert hash_files(Path(root)) == before


def hash_files(root: Path) -> dict[str, str]:
    paths = [path for path in root.rglob("*") if path.is_file() and ".git" not in path.relative_to(root).parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def upstream(clone: str) -> Iterator[contract.Host]:
    """DomainBed itself, left as it was found."""
    host = contract.find_host("upstream")
    plugin.unregister(host)
    yield host
    plugin.unregister(host)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MNIST's four files with 420 digits of noise, and a PACS of 6 pictures a domain in two unequal classes."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 300), ("t10k", 120)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            np.array([2051, count, 28, 28], ">i4").tobytes() + images.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + labels.tobytes())
    for domain in ("art_painting", "cartoon", "photo", "sketch"):
        for label, count in (("dog", 2), ("horse", 4)):
            folder = root / "PACS" / domain / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((64, 48)).save(Path(folder, f"{i}.{'png' if i % 2 else 'jpg'}"))
    return str(root)
