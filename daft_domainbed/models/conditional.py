"""Networks that depend on a number beside the image: feature-wise modulation and batch norm in two sets."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NORMS = (nn.BatchNorm2d, nn.GroupNorm)


class Condition:
    """What the conditional layers of one network share: the choices there are, and that of each sample under way.

    Attributes:
        codes: A row a choice, [J, D].
        choices: Of the samples, [B]; those of the first set of batch norm come first.
        n_first: How many these are.
    """

    codes: Tensor
    choices: Tensor
    n_first: int

    def set(self, codes: Tensor, choices: Tensor, n_first: int) -> None:
        """Describe the batch that the network sees next."""
        self.codes, self.choices, self.n_first = codes, choices, n_first


class FiLM(nn.Module):
    """Feature-wise linear modulation (Perez et al., 2018) by a small network of the condition's code.

    Maps features [B, C, H, W] to (1 + scale) x + shift, where scale and shift are C numbers a choice. The last layer
    begins at zero, so that a pretrained network begins as it was (OAT's own begins near scale 0: for training from
    scratch alone).

    Args:
        channels: C.
        code_size: D.
    """

    def __init__(self, channels: int, code_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(code_size, 2 * channels)
        self.output = nn.Linear(2 * channels, 2 * channels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """Modulate features, [B, C, H, W], each sample by its choice."""
        modulation = F.leaky_relu(self.output(F.leaky_relu(self.hidden(condition.codes)))).to(x.dtype)
        scale, shift = modulation[condition.choices, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, x, 1 + scale)


class ConditionalNorm(nn.Module):
    """A norm layer whose statistics and affine parameters are doubled, and whose output is modulated.

    Args:
        norm: The layer that this one takes the place of: the first set; the second set begins as its copy.
        code_size: Of the condition's codes.
        condition: Shared by the network's layers.
        is_dual: Whether there is a second set; group norm, which keeps no statistics, needs none.
    """

    rebuilt = ("condition",)  # nothing that a resumed run would miss

    def __init__(
        self, norm: nn.BatchNorm2d | nn.GroupNorm, code_size: int, condition: Condition, is_dual: bool
    ) -> None:
        super().__init__()
        # Some of timm's layers end with an activation, which has to come after the modulation.
        endings = [name for name in ("drop", "act") if hasattr(norm, name)]
        self.activation = nn.Sequential(*(getattr(norm, name) for name in endings))
        for name in endings:
            setattr(norm, name, nn.Identity())
        self.first = norm
        self.second = copy.deepcopy(norm) if is_dual and isinstance(norm, nn.BatchNorm2d) else None
        channels = norm.num_features if isinstance(norm, nn.BatchNorm2d) else norm.num_channels
        self.film = FiLM(channels, code_size)
        self.condition = condition

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and modulate features, [B, C, H, W]."""
        return self.activation(self.film(self._normalise(x), self.condition))

    def _normalise(self, x: Tensor) -> Tensor:
        n_first = self.condition.n_first
        if self.second is None or n_first == len(x):
            return self.first(x)
        if n_first == 0:
            return self.second(x)
        return torch.cat([self.first(x[:n_first]), self.second(x[n_first:])])


def make_conditional(network: nn.Module, condition: Condition, code_size: int, is_dual: bool) -> int:
    """Replace every batch norm and group norm of images in a network by a conditional one, in place.

    Args:
        network: Whatever it was trained to, it goes on to compute until the new layers learn.
        condition: To be shared by the new layers.
        code_size: Of its codes, D.
        is_dual: Whether batch norm gets a second set of statistics and parameters.

    Returns:
        The number of layers that were replaced.
    """
    norms = [(name, module) for name, module in network.named_modules() if isinstance(module, _NORMS)]
    for name, norm in norms:
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, ConditionalNorm(norm, code_size, condition, is_dual))
    return len(norms)
