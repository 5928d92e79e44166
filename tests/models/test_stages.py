from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from daft_domainbed.errors import UsageError
from daft_domainbed.models import frozen as frozen_module
from daft_domainbed.models.backbones import build_backbone, freeze_backbone, freeze_part
from daft_domainbed.models.frozen import FrozenPrefix, compute_frozen_in, fix_statistics, share_features
from daft_domainbed.models.stages import Prefix

SHAPE = (3, 32, 32)
NETWORKS = [("resnet8_w2", 1), ("resnet8_w2", 2), ("resnet18", 2), ("mobilenet_v3_small", 4)]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    backbone = build_backbone(name, SHAPE, "none", 32)
    for _ in range(2):  # statistics that are not those of a fresh network
        backbone(torch.randn(4, *SHAPE))
    return backbone


def freeze_by_hand(backbone: nn.Module, n_stages: int) -> nn.Module:
    """Freeze a prefix as anyone would: without gradients and in evaluation mode, the network computed as it stands."""
    prefix = Prefix(getattr(backbone, "network", backbone), n_stages)
    for part in prefix.modules:
        part.requires_grad_(False).eval()
    return backbone


@pytest.mark.parametrize(("name", "n_stages"), NETWORKS)
def test_a_prefix_with_memory_equals_the_same_without(name: str, n_stages: int) -> None:
    backbone = build(name)
    plain = freeze_by_hand(copy.deepcopy(backbone), n_stages).double()
    frozen = freeze_part(backbone, f"stages:{n_stages}", SHAPE).double()
    x = torch.randn(6, *SHAPE).double()  # the memory encodes sixteen images at a time, which rounds in another way
    for _ in range(3):  # new images, then remembered ones; batch norm of the other stages goes on
        features = frozen(x)
        expected = plain(x)
        assert torch.allclose(features, expected, rtol=1e-9, atol=1e-9)
    features.square().sum().backward()
    expected.square().sum().backward()
    for (key, one), (other_key, other) in zip(frozen.named_parameters(), plain.named_parameters(), strict=True):
        assert key == other_key
        assert one.requires_grad == other.requires_grad, key
        if other.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-7, atol=1e-9), key
        else:
            assert one.grad is None
    for (key, one), other in zip(frozen.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9), key


@pytest.mark.parametrize(("name", "n_stages"), NETWORKS[:2])
def test_a_prefix_stays_as_it_was_and_is_computed_once(
    name: str, n_stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = freeze_part(build(name), f"stages:{n_stages}", SHAPE)
    assert isinstance(frozen, FrozenPrefix)
    before = copy.deepcopy(frozen.prefix.get_state())
    calls: list[int] = []
    compute = frozen.prefix.compute
    monkeypatch.setattr(frozen.prefix, "compute", lambda x, encode: (calls.append(len(x)), compute(x, encode))[1])
    x = torch.randn(6, *SHAPE)
    for mode in (True, False, True):
        frozen.train(mode)
        frozen(x)
        assert not any(module.training for part in frozen.prefix.modules for module in part.modules())
    assert len(calls) == 1
    assert all(torch.equal(value, before[key]) for key, value in frozen.prefix.get_state().items())


def test_an_attack_gets_its_gradient_through_the_prefix() -> None:
    frozen = freeze_part(build("resnet8_w2"), "stages:2", SHAPE)
    x = torch.randn(2, *SHAPE, requires_grad=True)
    (gradient,) = torch.autograd.grad(frozen(x).sum(), x)
    assert gradient.abs().sum() > 0


def test_activations_are_shared_on_disk_by_networks_that_differ_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build("resnet18")
    student, other = (freeze_part(copy.deepcopy(backbone), "stages:2", SHAPE) for _ in range(2))
    with torch.no_grad():
        other.network.layer4[0].conv1.weight.mul_(2)
    x = torch.randn(3, *SHAPE)
    expected = other.eval()(x)
    for network in (student, other):
        share_features(network, tmp_path, pytest.fail)
    student(x)
    assert len(list(tmp_path.glob("*.sqlite"))) == 1
    monkeypatch.setattr(other.prefix, "compute", pytest.fail)
    assert torch.equal(other(x), expected)


def test_half_precision_is_remembered_as_it_was_computed() -> None:
    frozen = freeze_part(build("resnet8_w2"), "stages:1", SHAPE)
    x = torch.randn(2, *SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        first = frozen.eval()(x)
        assert torch.equal(frozen(x), first)
    (_, row), *_ = frozen.prefix_memory._kept.values()
    assert row.dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["stages:2", True])
def test_what_is_frozen_computes_in_fewer_bits_alone(part: str | bool) -> None:
    backbone = build("resnet18").eval()
    plain, frozen = copy.deepcopy(backbone), freeze_part(backbone, part, SHAPE)
    compute_frozen_in(frozen, torch.bfloat16)
    x = torch.randn(2, *SHAPE)
    features, expected = frozen(x), plain(x)
    assert torch.equal(frozen(x), features)
    assert features.dtype == torch.float32
    memory = frozen.memory if part is True else frozen.prefix_memory
    assert {row.dtype for _, row in memory._kept.values()} == {torch.bfloat16}
    assert 1e-5 < (features - expected).norm() / expected.norm() < 2e-2  # eight bits of each number
    if part is not True:
        features.sum().backward()
        trained = [parameter.grad for parameter in frozen.parameters() if parameter.grad is not None]
        assert {gradient.dtype for gradient in trained} == {torch.float32}


def test_freezing_all_of_it_remembers_features_alone() -> None:
    frozen = freeze_backbone(freeze_part(build("resnet18"), "stages:2", SHAPE))
    x = torch.randn(2, *SHAPE)
    assert torch.equal(frozen(x), frozen(x))
    assert frozen.prefix_memory is None
    assert len(frozen.memory._kept) == 2


def test_a_network_without_such_stages_is_refused() -> None:
    with pytest.raises(UsageError, match="has 3 stages"):
        freeze_part(build("resnet8_w2"), "stages:4", SHAPE)
    with pytest.raises(UsageError, match="no stages"):
        freeze_part(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), "stages:1", (3, 1, 1))

    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1, self.layer2 = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer2(self.layer1(x.flatten(1))) + x.flatten(1)

    with pytest.raises(UsageError, match="cannot be cut behind stage 1"):
        freeze_part(Shortcut(), "stages:1", (3, 1, 1))


def test_single_precision_differs_by_rounding_alone() -> None:
    backbone = build("resnet18").eval()
    plain = copy.deepcopy(backbone)
    frozen, x = freeze_part(backbone, "stages:2", SHAPE), torch.randn(6, *SHAPE)
    assert torch.allclose(frozen(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "timm/convnext_atto", "timm/tf_efficientnet_lite0"])
def test_timms_families_can_be_cut(name: str) -> None:
    pytest.importorskip("timm")
    frozen = freeze_part(
        build_backbone(name, (3, 64, 64), "none", 224 if "vit" in name else 64), "stages:2", (3, 64, 64)
    )
    frozen(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is None for part in frozen.prefix.modules for p in part.parameters())
    assert any(p.grad is not None for p in frozen.parameters())


@pytest.mark.parametrize("name", ["resnet8_w2", "resnet18"])
def test_fixed_statistics_stay_while_weights_learn(name: str) -> None:
    network = fix_statistics(build(name))
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    for mode in (True, False, True):
        network.train(mode)
        assert network.training == mode
        network(torch.randn(4, *SHAPE)).sum().backward()
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert all(norm.weight.grad is not None for norm in norms)
    assert list(network.state_dict()) == list(build(name).state_dict())


def test_torchvisions_resnet_is_cut_where_its_layers_are() -> None:
    network: Any = torchvision.models.resnet18()
    prefix = Prefix(network, 1)
    assert prefix.modules == [network.conv1, network.bn1, network.relu, network.maxpool, network.layer1]
    assert all(key.startswith(("conv1", "bn1", "layer1")) for key in prefix.get_state())


def test_activations_are_kept_as_far_as_the_machine_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_module, "share_free_memory", lambda: 3 * (1024 + 4 * 2 * 16 * 16))
    frozen = freeze_part(build("resnet8_w2"), "stages:1", SHAPE)
    frozen(torch.randn(8, *SHAPE))
    (_, row), *_ = frozen.prefix_memory._kept.values()
    assert (row.nbytes, len(frozen.prefix_memory._kept)) == (4 * 2 * 16 * 16, 3)
