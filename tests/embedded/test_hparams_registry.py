from __future__ import annotations

from types import SimpleNamespace

import pytest

from daft_domainbed.embedded import hparams_registry
from daft_domainbed.embedded.hparams_registry import default_hparams, random_hparams

DATASETS = ["Debug28", "Debug224", "RotatedMNIST", "ColoredMNIST", "PACS", "DomainNet", "EmojiStyles"]


def test_defaults_of_small_and_of_large_images() -> None:
    small, large = default_hparams("ERM", "ColoredMNIST"), default_hparams("ERM", "PACS")
    assert (small["lr"], small["batch_size"], small["weight_decay"]) == (1e-3, 64, 0)
    assert (large["lr"], large["batch_size"], large["weight_decay"]) == (5e-5, 32, 0)


@pytest.mark.parametrize(("dataset", "largest_batch"), [("Debug28", 2**9), ("PACS", 2**5.5), ("DomainNet", 2**5)])
def test_random_draws_stay_in_their_ranges(dataset: str, largest_batch: float) -> None:
    draws = [random_hparams("ERM", dataset, seed) for seed in range(200)]
    batch_sizes = {draw["batch_size"] for draw in draws}
    assert 8 <= min(batch_sizes) < 12
    assert 0.7 * largest_batch < max(batch_sizes) <= largest_batch
    exponents = (-4.5, -2.5) if dataset == "Debug28" else (-5, -3.5)
    assert all(10 ** exponents[0] <= draw["lr"] <= 10 ** exponents[1] for draw in draws)
    assert {draw["resnet_dropout"] for draw in draws} == {0, 0.1, 0.5}


def test_values_are_plain_python_types() -> None:
    for seed in range(5):
        assert {type(value) for value in random_hparams("ERM", "PACS", seed).values()} == {bool, int, float}


def test_public_functions_see_a_wrapped_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hparams_registry, "_hparams", lambda algorithm, dataset, seed: {"x": (dataset, seed)})
    assert default_hparams("ERM", "PACS") == {"x": "PACS"}
    assert random_hparams("ERM", "PACS", 3) == {"x": 3}


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("algorithm", ["ERM", "NoSuchAlgorithm"])
def test_values_equal_upstream(upstream: SimpleNamespace, algorithm: str, dataset: str) -> None:
    theirs = upstream.hparams_registry
    assert default_hparams(algorithm, dataset) == theirs.default_hparams(algorithm, dataset)
    for seed in range(50):
        assert random_hparams(algorithm, dataset, seed) == theirs.random_hparams(algorithm, dataset, seed)
