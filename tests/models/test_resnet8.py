from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from daft_domainbed.models.backbones import build_backbone
from daft_domainbed.models.resnet8 import ResNet8


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (2, 28), (3, 32), (3, 64)])
@pytest.mark.parametrize("width", [1, 4])
def test_resnet8_takes_any_image(channels: int, side: int, width: int) -> None:
    network = build_backbone(f"resnet8_w{width}", (channels, side, side))
    assert network.n_outputs == 4 * width
    assert network(torch.rand(2, channels, side, side)).shape == (2, 4 * width)


@pytest.mark.parametrize(("channels", "width"), [(2, 3), (3, 8)])
def test_resnet8_has_the_parameters_of_its_layers(channels: int, width: int) -> None:
    def count_block(n_in: int, n_out: int) -> int:
        convolutions = 9 * n_in * n_out + 9 * n_out * n_out + n_in * n_out
        return convolutions + 3 * 2 * n_out

    w = width
    expected = 9 * channels * w + 2 * w + count_block(w, w) + count_block(w, 2 * w) + count_block(2 * w, 4 * w)
    assert sum(p.numel() for p in ResNet8(channels, width).parameters()) == expected


def test_resnet8_is_the_network_it_says() -> None:
    """Recompute the features from the state dict alone."""
    network = ResNet8(3, 2).eval()
    for buffer in network.buffers():
        buffer.copy_(torch.rand_like(buffer.float()) + 0.5)
    state = network.state_dict()

    def convolve(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return torch.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def normalise(name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    images = torch.rand(2, 3, 16, 16)
    x = normalise("bn", convolve("conv", images)).relu()
    for i in range(3):
        block = f"blocks.{i}"
        out = normalise(f"{block}.bn1", convolve(f"{block}.conv1", x, 2)).relu()
        out = normalise(f"{block}.bn2", convolve(f"{block}.conv2", out))
        x = (out + normalise(f"{block}.bn3", convolve(f"{block}.shortcut", x, 2))).relu()
    assert x.shape == (2, 8, 2, 2)
    torch.testing.assert_close(network(images), x.mean(dim=(2, 3)))


def test_resnet8_depends_on_the_seed_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        states = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            states.append(build_backbone("resnet8_w2", (3, 8, 8)).state_dict()["conv.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_narrow_network_survives_larger_images() -> None:
    # In a process of its own: what it guards against is a crash of the interpreter.
    code = (
        "import torch; from daft_domainbed.models.resnet8 import ResNet8; network = ResNet8(3, 8);"
        "network(torch.randn(8, 3, 64, 64)).sum().backward()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
