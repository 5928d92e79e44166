from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from daft_domainbed.models.backbones import build_backbone, freeze_backbone
from daft_domainbed.models.feature_memory import FeatureMemory
from daft_domainbed.models.frozen import freeze, remember
from daft_domainbed.models.resnet8 import ResNet8


def is_frozen(module: nn.Module) -> bool:
    return not any(m.training for m in module.modules()) and not any(p.requires_grad for p in module.parameters())


def test_a_frozen_network_ignores_train_above_it() -> None:
    parent = nn.Sequential(ResNet8(3, 2), nn.Linear(8, 2))
    frozen = freeze(parent[0])
    assert frozen is parent[0]
    for mode in (True, False, True):
        parent.train(mode)
        assert is_frozen(frozen)
        assert parent[1].training == mode
    frozen.train()
    assert is_frozen(frozen)
    before = copy.deepcopy(parent[0].state_dict())
    parent(torch.rand(4, 3, 8, 8)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert parent[1].weight.grad is not None


def test_freezing_changes_no_name_and_no_answer() -> None:
    network, x = ResNet8(3, 2), torch.rand(2, 3, 8, 8)
    names, answer = list(network.state_dict()), network.eval()(x)
    freeze(network.train())
    assert list(network.state_dict()) == names
    assert torch.equal(network(x), answer)
    assert isinstance(network, ResNet8)
    assert str(network).startswith("FrozenResNet8(")


def test_freezing_twice_is_freezing_once() -> None:
    network = freeze(freeze(ResNet8(3, 2)))
    network.train()
    assert is_frozen(network)


def test_a_frozen_network_can_be_copied() -> None:
    network = freeze(ResNet8(3, 2))
    twin = copy.deepcopy(nn.Sequential(network)).train()[0]
    assert twin is not network
    assert is_frozen(twin)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(twin(x), network(x))


def test_freezing_one_network_leaves_others_of_its_class() -> None:
    freeze(ResNet8(3, 2))
    other = ResNet8(3, 2).eval().train()
    assert other.training
    assert all(parameter.requires_grad for parameter in other.parameters())


@pytest.fixture(params=["shufflenet_v2_x0_5", "resnet8_w2"])
def remembering(request: pytest.FixtureRequest) -> Any:
    return remember(build_backbone(request.param, (3, 32, 32), "none"), FeatureMemory())


def test_a_frozen_backbone_remembers_its_answers(remembering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3, 3, 32, 32)
    first = remembering(x)
    twin = copy.deepcopy(remembering)
    with monkeypatch.context() as patch:
        patch.setattr(remembering, "memory", FeatureMemory())
        torch.testing.assert_close(remembering(x), first)
    for module in remembering.modules():
        if isinstance(module, nn.Conv2d):
            module.forward = None  # type: ignore[assignment]  # from here on, encoding an image fails
    assert torch.equal(remembering(x.flip(0)), first.flip(0))
    assert torch.equal(twin(x), first)
    with pytest.raises(TypeError):
        remembering(x + 1)


def test_a_frozen_backbone_passes_an_attack_its_gradient(remembering: Any) -> None:
    x = torch.rand(2, 3, 32, 32)
    remembering(x)  # remembered, but without a gradient
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(remembering(x).square().sum(), x)
    assert gradient.abs().sum() > 0


def test_only_an_expensive_backbone_remembers_unasked() -> None:
    assert is_frozen(freeze_backbone(ResNet8(3, 2)))
    assert not hasattr(freeze_backbone(ResNet8(3, 2)), "memory")
    expensive = freeze_backbone(build_backbone("shufflenet_v2_x0_5", (3, 32, 32), "none"))
    assert is_frozen(expensive)
    assert isinstance(expensive.memory, FeatureMemory)


def test_what_remembers_is_frozen() -> None:
    memory = FeatureMemory()
    network: Any = nn.Sequential(remember(ResNet8(3, 2), memory)).train()[0]
    assert is_frozen(network)
    assert network.memory is memory
    assert remember(freeze(network), FeatureMemory()) is network
    assert network.memory is not memory
