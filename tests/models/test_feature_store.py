"""Features on disk: the encoder's own, asked for once by all who share a file, and never a reason to fail."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.host import checkpoints
from daft_domainbed.models import weights
from daft_domainbed.models.backbones import HeadlessBackbone, freeze_backbone
from daft_domainbed.models.feature_memory import FeatureMemory
from daft_domainbed.models.feature_store import FeatureStore, name_backbone
from daft_domainbed.models.frozen import freeze, remember, share_features
from daft_domainbed.models.resnet8 import ResNet8
from tests.models.test_feature_memory import BATCHES, Encoder, make_images, make_network


def refuse(text: str) -> None:
    pytest.fail(text)


@settings(max_examples=30)  # each writes to a disk
@given(BATCHES)
def test_answers_as_the_encoder_does_and_asks_it_once_an_image(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]]
) -> None:
    file, encoder = tmp_path_factory.mktemp("store") / "a.sqlite", Encoder()
    for values in batches:  # each in another job
        features = FeatureStore(file, refuse).recall(make_images(values), encoder)
        assert features.tolist() == [[4.0 * value] * 3 for value in values]
    assert len(encoder.seen) == len({value for values in batches for value in values})


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_an_image_may_stand_in_a_batch_twice(tmp_path_factory: pytest.TempPathFactory, values: list[int]) -> None:
    store = FeatureStore(tmp_path_factory.mktemp("store") / "a.sqlite", refuse)
    for _ in range(2):
        assert store.recall(make_images(values), Encoder()).tolist() == [[4.0 * value] * 3 for value in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    images = torch.rand(5, 3, 8, 8)
    network = make_network().to(dtype)
    first, second = (
        FeatureStore(tmp_path / "a.sqlite", refuse).recall(images, lambda x: network(x.to(dtype))) for _ in range(2)
    )
    assert first.dtype == second.dtype == dtype
    assert torch.equal(first, second)


def test_which_images_came_before_changes_no_bit(tmp_path: Path) -> None:
    network, images = make_network(), torch.rand(40, 3, 8, 8)
    alone = FeatureStore(tmp_path / "a.sqlite", refuse).recall(images, network)
    store = FeatureStore(tmp_path / "b.sqlite", refuse)
    store.recall(images[::3], network)
    assert torch.equal(store.recall(images, network), alone)


def test_precisions_are_kept_apart(tmp_path: Path) -> None:
    store, network, images = FeatureStore(tmp_path / "a.sqlite", refuse), make_network(), torch.rand(3, 3, 8, 8)
    plain = store.recall(images, network)
    with torch.autocast("cpu", torch.bfloat16):
        rough = store.recall(images, network)
    assert rough.dtype == torch.bfloat16 != plain.dtype
    assert torch.equal(store.recall(images, network), plain)


def fill(file: Path, start: int) -> None:
    store = FeatureStore(file, refuse)
    for value in range(start, start + 40):
        assert store.recall(make_images([value, 1000 + value]), Encoder()).tolist()[0] == [4.0 * value] * 3


def test_many_jobs_at_a_time(tmp_path: Path) -> None:
    context = get_context("fork")
    jobs = [context.Process(target=fill, args=(tmp_path / "a.sqlite", 20 * i)) for i in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 4
    encoder = Encoder()
    FeatureStore(tmp_path / "a.sqlite", refuse).recall(make_images([*range(100)]), encoder)
    assert encoder.seen == []


def start_at_once(folder: Path, barrier: Any, n_files: int) -> None:
    for i in range(n_files):
        barrier.wait(timeout=60)
        store = FeatureStore(folder / f"{i}.sqlite", refuse)
        assert store.recall(make_images([i]), Encoder()).tolist() == [[4.0 * i] * 3]


def test_many_jobs_make_a_file_at_a_time(tmp_path: Path) -> None:
    context = get_context("fork")
    n_jobs, n_files = 4, 25
    barrier = context.Barrier(n_jobs)
    jobs = [context.Process(target=start_at_once, args=(tmp_path, barrier, n_files)) for _ in range(n_jobs)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * n_jobs
    encoder = Encoder()
    for i in range(n_files):
        FeatureStore(tmp_path / f"{i}.sqlite", refuse).recall(make_images([i]), encoder)
    assert encoder.seen == []


def test_a_damaged_row_is_encoded_again(tmp_path: Path) -> None:
    file, encoder = tmp_path / "a.sqlite", Encoder()
    FeatureStore(file, refuse).recall(make_images([1, 2]), encoder)
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE features SET row = zeroblob(12) WHERE rowid = 1")
    encoder.seen.clear()
    for _ in range(2):
        features = FeatureStore(file, refuse).recall(make_images([1, 2]), encoder)
        assert features.tolist() == [[4.0] * 3, [8.0] * 3]
    assert len(encoder.seen) == 1  # and the sound row takes the damaged one's place


def test_no_row_is_added_to_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daft_domainbed.models.feature_store._FREE", 2**80)
    encoder = Encoder()
    for _ in range(2):
        store = FeatureStore(tmp_path / "a.sqlite", refuse)
        assert store.recall(make_images([1]), encoder).tolist() == [[4.0] * 3]
    assert len(encoder.seen) == 2


def test_accelerators_encode_rather_than_look_up(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "a.sqlite", refuse)
    asked = []

    def encode(images: Tensor) -> Tensor:
        asked.append(len(images))
        return torch.empty(len(images), 3, device=images.device)

    for _ in range(2):
        features = store.recall(torch.empty(2, 1, 2, 2, device="meta"), encode)
        assert (features.shape, features.device.type) == ((2, 3), "meta")
    assert len(asked) == 2


@pytest.mark.parametrize("damage", ["garbage", "folder"])
def test_what_cannot_be_used_is_said_once_and_done_without(tmp_path: Path, damage: str) -> None:
    file, said, encoder = tmp_path / "a.sqlite", [], Encoder()
    if damage == "garbage":
        file.write_bytes(b"no database" * 1000)
    else:
        file.mkdir()
    store = FeatureStore(file, said.append)
    for _ in range(2):
        assert store.recall(make_images([1, 2]), encoder).tolist() == [[4.0] * 3, [8.0] * 3]
    assert len(encoder.seen) == 2  # the run's own memory has them
    assert len(said) == 1
    assert said[0].startswith(f"--feature_cache: {file} is not used by this run (")
    assert said[0].endswith("): choose another folder")


def test_damage_that_appears_later_is_survived(tmp_path: Path) -> None:
    said: list[str] = []
    store = FeatureStore(tmp_path / "a.sqlite", said.append)
    store.recall(make_images([1]), Encoder())
    (tmp_path / "a.sqlite").write_bytes(b"no database" * 1000)
    for _ in range(2):
        assert store.recall(make_images([1, 2]), Encoder()).tolist() == [[4.0] * 3, [8.0] * 3]
    assert len(said) <= 1


def test_a_name_is_what_a_backbone_computes() -> None:
    class Scaled(nn.Linear):
        def extra_repr(self) -> str:
            return f"scale={self.scale}"

    def make(scale: float, seed: int) -> Any:
        torch.manual_seed(seed)
        module = Scaled(3, 2)
        module.scale = scale
        return module

    assert name_backbone(make(1, 0)) == name_backbone(make(1, 0))
    assert len({name_backbone(make(scale, seed)) for scale in (1, 2) for seed in (0, 1)}) == 4


def set_weights(module: nn.Module) -> Any:
    for value in module.state_dict().values():
        value.fill_(1)
    return module


def test_names_are_those_of_files_made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned: what 06410da named these two, before classes changed their names; versions and processor fixed.

    What torch's layers say of themselves is left out: it differs from version to version.
    """
    monkeypatch.setattr("daft_domainbed.models.feature_store.__version__", "1")
    monkeypatch.setattr(torch, "__version__", "2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for name in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__="0"))
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Flatten, nn.Linear):
        monkeypatch.setattr(kind, "extra_repr", lambda self: "")
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())
    headless = HeadlessBackbone(network, 16, INPUT_SPECS["unit"], INPUT_SPECS["imagenet"], (3, 8, 8), "tiny")
    assert name_backbone(freeze_backbone(set_weights(headless))) == "bfef6ae809081413"
    assert name_backbone(remember(set_weights(ResNet8(3, 2)), FeatureMemory())) == "4cfcbe73b55f9e69"


def test_only_what_is_frozen_and_remembers_is_shared(tmp_path: Path) -> None:
    frozen = remember(nn.Linear(3, 2), FeatureMemory())
    share_features(nn.Sequential(nn.Linear(3, 3), frozen, freeze(nn.Linear(2, 2))), tmp_path / "new", refuse)
    x = torch.rand(4, 3)
    answer = frozen(x)
    assert torch.equal(frozen(x), answer)
    assert len([*(tmp_path / "new").glob("*.sqlite")]) == 1


def test_runs_with_a_store_are_those_without(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(name: str, **flags: Any) -> str:
        hparams = {"teacher_frozen": True, "data_augmentation": False, "aft_attack": "features"}
        run = tiny.train(name, hparams, algorithm="DAFT", teachers_dir=str(tmp_path / f"{name} teachers"), **flags)
        return weights.hash_state(checkpoints.load_checkpoint(run / "model.pkl")["model_dict"])

    store = str(tmp_path / "features")
    without = train("without")
    assert train("first", feature_cache=store) == without
    assert [*Path(store).glob("*.sqlite")]
    monkeypatch.setattr("daft_domainbed.models.feature_store.encode_in_chunks", refuse_new)
    assert train("second", feature_cache=store) == without


def test_what_a_run_trains_is_not_stored(tiny: Any, tmp_path: Path) -> None:
    tiny.train("run", algorithm="DAFT", teachers_dir=str(tmp_path / "teachers"), feature_cache=str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def refuse_new(images: Tensor, rows: list[int], encode: Any) -> dict[int, Tensor]:
    assert not rows
    return {}
