"""The user's own DomainBed beside the embedded host, and small files in the layouts that both read."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor


@pytest.fixture(scope="session")
def upstream() -> SimpleNamespace:
    """DomainBed's modules by the names that the embedded host gives them."""
    root = os.environ.get("DOMAINBED_ROOT")
    if not root:
        pytest.skip("DOMAINBED_ROOT is not set: no clone of DomainBed to compare with")
    if root not in sys.path:
        sys.path.insert(0, root)
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        names = ("algorithms", "datasets", "hparams_registry", "networks", "lib.misc")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return SimpleNamespace(**{n.split(".")[-1]: importlib.import_module(f"domainbed.{n}") for n in names})
    finally:
        sys.dont_write_bytecode = writes_bytecode


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let networks keep their initial weights where they would download trained ones."""
    timm = pytest.importorskip("timm")
    for name in ("resnet18", "resnet50"):
        build = getattr(torchvision.models, name)
        monkeypatch.setattr(torchvision.models, name, lambda build=build, **_: build())
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **_: create(name))


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with MNIST's four files: 120 training and 60 test images of noise."""
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 120), ("t10k", 60)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            np.array([2051, count, 28, 28], ">i4").tobytes() + images.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + labels.tobytes())
    return str(root)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes an image folder: two coloured pictures, wider than high, for each class of each domain."""

    def make(name: str, domains: dict[str, list[str]]) -> Path:
        generator = np.random.default_rng(0)
        for domain, classes in domains.items():
            for label in classes:
                folder = tmp_path / name / domain / label
                folder.mkdir(parents=True)
                for i, suffix in enumerate(("png", "jpg")):
                    pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).resize((64, 48)).save(folder / f"{i}.{suffix}")
        return tmp_path / name

    return make


@pytest.fixture
def pacs_root(make_folder: Callable[..., Path]) -> str:
    """A data folder that holds a small PACS."""
    return str(make_folder("PACS", {domain: ["dog", "horse"] for domain in "ACPS"}).parent)


@pytest.fixture(autouse=True)
def seed_torch() -> Iterator[None]:
    """Start each test from one random state, and leave none behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def assert_equal_samples() -> Callable[..., None]:
    """Compares the environments of two data sets, sample by sample under the same random state, bit for bit."""

    def compare(ours: object, theirs: object) -> None:
        assert len(ours) == len(theirs)
        assert ours.input_shape == theirs.input_shape
        assert ours.num_classes == theirs.num_classes
        for our_env, their_env in zip(ours, theirs, strict=True):
            assert len(our_env) == len(their_env)
            torch.manual_seed(1)
            our_samples = [our_env[i] for i in range(len(our_env))]
            our_state = torch.get_rng_state()
            torch.manual_seed(1)
            their_samples = [their_env[i] for i in range(len(their_env))]
            assert torch.equal(our_state, torch.get_rng_state())
            for (our_x, our_y), (their_x, their_y) in zip(our_samples, their_samples, strict=True):
                assert_identical(our_x, their_x)
                assert type(our_y) is type(their_y)
                assert our_y == their_y

    return compare


def assert_identical(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
