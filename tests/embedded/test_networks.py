from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import nn

from daft_domainbed.embedded import networks
from daft_domainbed.embedded.hparams_registry import default_hparams
from daft_domainbed.errors import UsageError

HPARAMS = {
    **default_hparams("ERM", "PACS"),
    "resnet50_augmix": False,
    "mlp_width": 6,
    "mlp_depth": 4,
    "mlp_dropout": 0.5,
}
SMALL_INPUTS = [(5,), (1, 28, 28), (2, 28, 28), (3, 32, 32)]
RESNETS: list[dict[str, Any]] = [
    {"resnet18": True},
    {"resnet18": True, "freeze_bn": True, "resnet_dropout": 0.5},
    {},
    {"resnet50_augmix": True},
    {"resnet50_augmix": True, "resnet18": True},
]


def build_seeded(host: ModuleType, input_shape: tuple[int, ...], hparams: dict[str, Any]) -> nn.Module:
    torch.manual_seed(7)
    return host.Featurizer(input_shape, hparams)


def assert_same_network(ours: nn.Module, theirs: nn.Module, input_shape: tuple[int, ...]) -> None:
    our_state, their_state = ours.state_dict(), theirs.state_dict()
    assert list(our_state) == list(their_state)
    assert all(torch.equal(our_state[name], their_state[name]) for name in their_state)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    x = torch.randn(3, *input_shape)
    for mode in (True, False):
        outputs = []
        for network in (ours, theirs):
            network.train(mode)
            torch.manual_seed(8)
            outputs.append(network(x))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("input_shape", SMALL_INPUTS)
def test_featurizer_gives_as_many_features_as_it_says(input_shape: tuple[int, ...]) -> None:
    featurizer = networks.Featurizer(input_shape, HPARAMS)
    features = featurizer(torch.randn(3, *input_shape))
    assert features.shape == (3, featurizer.n_outputs)


def test_wide_resnet_is_16_layers_deep_and_two_wide() -> None:
    network = networks.Wide_ResNet((3, 32, 32))
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    shortcuts = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    # 16 = 6 n + 4 with n = 2 blocks a stage: the stem, 12 in blocks, and 3 more layers: the shortcuts of new widths.
    assert len(convolutions) == 13
    assert [shortcut.out_channels for shortcut in shortcuts] == [16 * 2, 32 * 2, 64 * 2]


@pytest.mark.usefixtures("untrained")
def test_resnet18_alone_needs_augmix_off() -> None:
    assert networks.ResNet((3, 224, 224), {**HPARAMS, "resnet18": True}).n_outputs == 512
    assert networks.ResNet((3, 224, 224), {**HPARAMS, "resnet18": True, "resnet50_augmix": True}).n_outputs == 2048


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("freeze_bn", [True, False])
def test_resnet_train_returns_itself_and_keeps_frozen_norms(freeze_bn: bool) -> None:
    network = networks.ResNet((3, 224, 224), {**HPARAMS, "resnet18": True, "freeze_bn": freeze_bn})
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert {norm.training for norm in norms} == {not freeze_bn}
    assert copy.deepcopy(network).eval().training is False
    assert network.train() is network
    assert network.training
    assert {norm.training for norm in norms} == {not freeze_bn}


@pytest.mark.usefixtures("untrained")
def test_resnet_repeats_rgb_filters_for_further_channels() -> None:
    torch.manual_seed(3)
    rgb = networks.ResNet((3, 224, 224), {**HPARAMS, "resnet18": True}).network.conv1.weight
    torch.manual_seed(3)
    five = networks.ResNet((5, 224, 224), {**HPARAMS, "resnet18": True}).network.conv1.weight
    assert torch.equal(five, rgb[:, [0, 1, 2, 0, 1]])


def test_classifier_halves_the_features_twice_if_nonlinear() -> None:
    assert isinstance(networks.Classifier(12, 5), nn.Linear)
    nonlinear = networks.Classifier(12, 5, is_nonlinear=True)
    assert [tuple(p.shape) for p in nonlinear.parameters() if p.dim() == 2] == [(6, 12), (3, 6), (5, 3)]


def test_input_without_default_network_is_named() -> None:
    with pytest.raises(UsageError, match=r"\(3, 64, 64\)"):
        networks.Featurizer((3, 64, 64), HPARAMS)


def test_vision_transformers_are_left_to_upstream() -> None:
    with pytest.raises(UsageError, match="--host upstream"):
        networks.Featurizer((3, 224, 224), {**HPARAMS, "vit": True})


def test_missing_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        networks.Featurizer((3, 224, 224), {**HPARAMS, "resnet50_augmix": True})


def test_weights_out_of_reach_are_named_with_their_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UsageError) as error:
        networks.Featurizer((3, 224, 224), {**HPARAMS, "resnet18": True})
    message = str(error.value)
    assert "no network" in message
    assert "resnet18-f37072fd.pth" in message
    assert str(tmp_path / "hub" / "checkpoints") in message
    assert "\n" not in message


def test_timm_weights_in_torch_home_are_preferred(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    asked: list[Any] = []

    def create(name: str, pretrained: bool, pretrained_cfg_overlay: dict[str, str]) -> None:
        asked.append(pretrained_cfg_overlay)
        raise ConnectionError("hub\nout of reach")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UsageError, match=r"\(hub\): put resnet50_ram-a26f946b\.pth from https://"):
        networks.build_augmix_resnet50()
    file = tmp_path / "hub" / "checkpoints" / "resnet50_ram-a26f946b.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(UsageError):
        networks.build_augmix_resnet50()
    assert asked == [{}, {"file": str(file)}]


@pytest.mark.parametrize("input_shape", SMALL_INPUTS)
def test_small_networks_equal_upstream(upstream: SimpleNamespace, input_shape: tuple[int, ...]) -> None:
    ours, theirs = (build_seeded(host, input_shape, HPARAMS) for host in (networks, upstream.networks))
    assert_same_network(ours, theirs, input_shape)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("hparams", RESNETS)
@pytest.mark.parametrize("channels", [3, 2])
def test_resnets_equal_upstream(upstream: SimpleNamespace, hparams: dict[str, Any], channels: int) -> None:
    states, built = [], []
    for host in (networks, upstream.networks):
        built.append(build_seeded(host, (channels, 224, 224), {**HPARAMS, **hparams}))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert_same_network(built[0], built[1], (channels, 64, 64))


@pytest.mark.parametrize("is_nonlinear", [False, True])
def test_classifier_equals_upstream(upstream: SimpleNamespace, is_nonlinear: bool) -> None:
    classifiers = []
    for host in (networks, upstream.networks):
        torch.manual_seed(7)
        classifiers.append(host.Classifier(12, 5, is_nonlinear))
    assert_same_network(classifiers[0], classifiers[1], (12,))
