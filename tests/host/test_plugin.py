"""What `register` adds to a host, and that nothing of it stays or disturbs what was there: on both hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from daft_domainbed import plugin
from daft_domainbed.errors import UsageError
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.host import contract
from daft_domainbed.methods import list_ours
from daft_domainbed.models.resnet8 import ResNet8
from daft_domainbed.models.weights import to_plain
from daft_domainbed.plugin.defaults import list_hparams
from daft_domainbed.plugin.registration import OUR_DATASETS
from tests.conftest import get_defaults

OURS = list(list_ours())
HOSTS = ["embedded", "upstream"]


@pytest.fixture(params=HOSTS)
def bare(request: pytest.FixtureRequest) -> Iterator[contract.Host]:
    """Each host without anything of ours."""
    if request.param == "upstream":
        host = request.getfixturevalue("upstream")
    else:
        host = contract.find_host("embedded")
        plugin.unregister(host)
    yield host
    plugin.unregister(host)


@pytest.fixture
def host(bare: contract.Host) -> contract.Host:
    """Each host with everything of ours."""
    plugin.register(bare)
    return bare


def list_modules(host: contract.Host) -> list[ModuleType]:
    return [host.algorithms, host.datasets, host.networks, host.hparams_registry, host.misc]


def photograph(host: contract.Host) -> list[dict[str, Any]]:
    """Every name of every module; lists by their content, which registering appends to."""
    return [
        {name: list(value) if isinstance(value, list) else value for name, value in vars(module).items()}
        for module in list_modules(host)
    ]


def draw_hparams(host: contract.Host, algorithms: list[str]) -> dict[tuple[Any, ...], dict[str, tuple[type, Any]]]:
    """Defaults and draws, with their types: np.float64(0.1) is not 0.1 to whoever writes it to JSON."""
    return {
        (algorithm, dataset, seed): {
            name: (type(value), value)
            for name, value in (
                registry.random_hparams(algorithm, dataset, seed)
                if seed
                else registry.default_hparams(algorithm, dataset)
            ).items()
        }
        for registry in [host.hparams_registry]
        for algorithm in algorithms
        for dataset in ["Debug28", "ColoredMNIST", "PACS", "DomainNet", "TerraIncognita", "SVIRO"]
        if dataset in host.datasets.DATASETS
        for seed in (0, 1, 2**31 - 1)
    }


def test_unregistering_leaves_every_name_as_it_was(bare: contract.Host) -> None:
    before = photograph(bare)
    plugin.register(bare)
    assert photograph(bare) != before
    plugin.unregister(bare)
    assert photograph(bare) == before
    plugin.unregister(bare)
    assert photograph(bare) == before


def test_registering_twice_is_harmless(host: contract.Host) -> None:
    once = photograph(host)
    plugin.register(host)
    assert photograph(host) == once


def test_other_algorithms_draw_what_they_drew(bare: contract.Host) -> None:
    algorithms = list(bare.algorithms.ALGORITHMS)
    before = draw_hparams(bare, algorithms)
    plugin.register(bare)
    for key, after in draw_hparams(bare, algorithms).items():
        assert before[key].items() <= after.items()
        assert set(after) - set(before[key]) <= {name for algorithm in OURS for name in list_hparams(algorithm)}


def test_our_algorithms_are_the_hosts(host: contract.Host) -> None:
    assert host.algorithms.ALGORITHMS[-len(OURS) :] == OURS
    for name in OURS:
        algorithm = host.algorithms.get_algorithm_class(name)
        assert algorithm is contract.get_algorithm_class(host, name)
        assert issubclass(algorithm, host.algorithms.ERM)
        assert issubclass(algorithm, host.algorithms.Algorithm)
        assert algorithm.__name__ == name


def test_our_draws_are_the_same_on_both_hosts(upstream: contract.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daft_domainbed.embedded.datasets.list_domains", lambda path, **kwargs: ["a", "b", "c"])
    embedded = contract.find_host("embedded")
    plugin.register(embedded)
    plugin.register(upstream)
    for algorithm in ["ERM", *OURS]:
        for dataset in ["Debug28", "RotatedMNIST", "PACS", "EmojiStyles", "ColoredDigits", "folder:x"]:
            for seed in (0, 1, 2):
                draws = [host.hparams_registry._hparams(algorithm, dataset, seed) for host in (embedded, upstream)]
                assert to_plain(draws[0]) == to_plain(draws[1])


def test_our_data_sets_are_the_hosts(host: contract.Host) -> None:
    for name in OUR_DATASETS:
        assert name in host.datasets.DATASETS
        # The three ways in which DomainBed's own scripts look one up.
        assert vars(host.datasets)[name] is host.datasets.get_dataset_class(name)
        assert host.datasets.num_environments(name) == len(contract.describe_dataset(host, name, {}).environments)
    dataset = contract.get_dataset_class(host, "EmojiStyles")(None, [3], {"data_augmentation": True})
    assert len(dataset) == 4
    x, y = dataset[0][0]
    assert (x.shape, x.dtype) == ((3, 32, 32), torch.float32)
    assert 0 <= int(y) < dataset.num_classes


def test_a_folder_is_a_data_set_of_either_host(host: contract.Host, data_dir: str) -> None:
    name = f"folder:{Path(data_dir) / 'PACS'}"
    assert contract.describe_dataset(host, name, {}).environments == ("art_painting", "cartoon", "photo", "sketch")
    dataset = contract.get_dataset_class(host, name)(None, [0], {"data_augmentation": False, "input_size": 40})
    assert dataset[0][0][0].shape == (3, 40, 40)


@pytest.mark.parametrize(
    ("dataset", "spec", "seeded"),
    [
        ("Debug28", "none", True),
        ("Debug224", "none", True),
        ("RotatedMNIST", "unit", True),
        ("ColoredMNIST", "unit", True),
        ("PACS", "imagenet", False),
        ("DomainNet", "imagenet", False),
        ("EmojiStyles", "unit", False),
        ("ColoredDigits", "unit", True),
    ],
)
def test_pixels_and_seeds_are_known_by_data_set(host: contract.Host, dataset: str, spec: str, seeded: bool) -> None:
    assert contract.describe_dataset(host, dataset, {}).input_spec == INPUT_SPECS[spec]
    assert contract.describe_dataset(host, dataset, {}).is_seeded == seeded


@pytest.mark.parametrize("dataset", ["SVIRO", "WILDSCamelyon", "WILDSFMoW", "SpawriousO2O_easy"])
def test_pixels_of_what_only_upstream_has_are_imagenets(upstream: contract.Host, dataset: str) -> None:
    plugin.register(upstream)
    assert contract.describe_dataset(upstream, dataset, {}).input_spec == INPUT_SPECS["imagenet"]


def test_unknown_names_are_answered_with_upstreams_nearest(upstream: contract.Host) -> None:
    plugin.register(upstream)
    with pytest.raises(UsageError, match="no algorithm 'GroupRDO' in host upstream. Did you mean 'GroupDRO'"):
        contract.get_algorithm_class(upstream, "GroupRDO")
    with pytest.raises(
        UsageError, match="no data set 'TerraIncognito' in host upstream. Did you mean 'TerraIncognita'"
    ):
        contract.get_dataset_class(upstream, "TerraIncognito")
    # A helper of the module is no algorithm, though the host's own look-up would hand it out.
    with pytest.raises(UsageError, match="no algorithm 'MovingAverage'"):
        contract.get_algorithm_class(upstream, "MovingAverage")
    assert contract.get_algorithm_class(upstream, "IRM") is upstream.algorithms.IRM


def test_featurizer_is_the_hosts_unless_a_backbone_is_named(host: contract.Host) -> None:
    defaults = get_defaults(host, "ERM", "Debug28")
    assert type(host.networks.Featurizer((3, 28, 28), defaults)) is host.networks.MNIST_CNN
    named = host.networks.Featurizer((3, 28, 28), defaults | {"backbone": "resnet8_w2"})
    assert isinstance(named, ResNet8)
    assert named.n_outputs == 8


def test_frozen_backbone_stays_frozen(host: contract.Host) -> None:
    chosen = get_defaults(host, "ERM", "Debug28") | {
        "backbone": "resnet8_w2",
        "backbone_frozen": True,
    }
    algorithm = host.algorithms.ERM((3, 28, 28), 2, 2, chosen)
    algorithm.train()
    before = {name: value.clone() for name, value in algorithm.featurizer.state_dict().items()}
    algorithm.update([(torch.randn(4, 3, 28, 28), torch.tensor([0, 1, 0, 1]))] * 2)
    assert all(torch.equal(value, before[name]) for name, value in algorithm.featurizer.state_dict().items())
    assert not any(parameter.requires_grad for parameter in algorithm.featurizer.parameters())


def test_other_sizes_get_a_resnet(host: contract.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.networks, "ResNet", lambda shape, chosen: nn.Linear(shape[-1], 1))
    assert host.networks.Featurizer((3, 96, 96), {}).in_features == 96
