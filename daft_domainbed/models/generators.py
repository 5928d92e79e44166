"""Networks that make perturbations, as small as they are asked to be, and the optimizer that trains them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODE_SIZE = 64
_CODE_SIDE = 32  # of the map that a code becomes


class _Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and a shortcut with a convolution where channels change."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        self.shortcut = nn.Sequential()
        if n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


class Generator(nn.Module):
    """ADT's generator (Dong et al., 2020): three residual blocks at the image's own resolution.

    Args:
        n_in: Channels that it sees.
        n_out: Channels that it makes.
        width: Channels of the first convolution; the blocks have twice, twice and once as many. The authors' is 256.
        has_code: Whether it sees a random code as one more channel.
    """

    def __init__(self, n_in: int, n_out: int, width: int, has_code: bool = False) -> None:
        super().__init__()
        self.code = None
        if has_code:
            self.code = nn.Sequential(nn.Linear(CODE_SIZE, 256), nn.ReLU(), nn.Linear(256, _CODE_SIDE**2), nn.ReLU())
        self.layers = nn.Sequential(
            nn.Conv2d(n_in + has_code, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _Block(width, 2 * width),
            _Block(2 * width, 2 * width),
            _Block(2 * width, width),
            nn.Conv2d(width, n_out, 3, padding=1, bias=False),
        )
        self.apply(_initialise)

    def forward(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        """Map inputs, [B, n_in, H, W], and codes, [B, CODE_SIZE], to [B, n_out, H, W]."""
        if self.code is not None:
            plane = self.code(code).view(-1, 1, _CODE_SIDE, _CODE_SIDE)
            if plane.shape[2:] != x.shape[2:]:
                plane = F.interpolate(plane, size=x.shape[2:], mode="bilinear", align_corners=False)
            x = torch.cat([x, plane], dim=1)
        output: Tensor = self.layers(x)
        return output


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


class CodeEncoder(nn.Module):
    """ADT's encoder: four convolutions that read a perturbation's code; returns its mean and spread.

    Args:
        n_in: Channels of the perturbation.
    """

    def __init__(self, n_in: int) -> None:
        super().__init__()
        channels, kernels, strides = (n_in, 32, 64, 128, 256), (5, 4, 4, 4), (1, 2, 1, 2)
        layers: list[nn.Module] = []
        for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
            layers += [
                nn.Conv2d(channels[i], channels[i + 1], kernel, stride, bias=False),
                nn.BatchNorm2d(channels[i + 1]),
                nn.LeakyReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.output = nn.Linear(channels[-1], 2 * CODE_SIZE)

    def forward(self, perturbation: Tensor) -> tuple[Tensor, Tensor]:
        """Map perturbations, [B, n_in, H, W], to mean and spread of their codes, [B, CODE_SIZE] each."""
        mean, spread = self.output(self.layers(perturbation)).chunk(2, dim=1)
        return mean, spread


class Helpers:
    """Networks that train beside a student and are none of its modules, with one Adam for all of them.

    So the student's state dict, optimizer and device know nothing of them: they follow their input's device, and a
    resumed run restores them by `state_dict`.

    Args:
        networks: By name.
        lr: Of Adam.
        betas: Of Adam, by name of the network.
    """

    def __init__(self, networks: dict[str, nn.Module], lr: float, betas: dict[str, tuple[float, float]]) -> None:
        self.networks = nn.ModuleDict(networks)
        groups: list[dict[str, Any]] = [
            {"params": network.parameters(), "betas": betas[name]} for name, network in networks.items()
        ]
        self.optimizer = torch.optim.Adam(groups, lr=lr)

    def __getitem__(self, name: str) -> nn.Module:
        return self.networks[name]

    def follow(self, x: Tensor) -> None:
        """Move to the device of a tensor."""
        if next(self.networks.parameters()).device != x.device:
            self.networks.to(x.device)
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # which moves to where its parameters are

    def state_dict(self) -> dict[str, Any]:
        """Return what has to survive a restart."""
        return {"networks": self.networks.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved state."""
        self.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
