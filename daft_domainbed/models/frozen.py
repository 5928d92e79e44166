"""Frozen modules: no gradients, always in evaluation mode, and with a memory of their features where that is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from daft_domainbed.errors import UsageError
from daft_domainbed.models.feature_memory import FeatureMemory
from daft_domainbed.models.feature_store import FeatureStore, name_backbone, name_layers
from daft_domainbed.models.stages import Prefix
from daft_domainbed.runtime.machine import share_free_memory


class Frozen:
    """Mixed into the class of a module that is frozen: `train()`, whoever calls it, changes nothing."""

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode."""
        return self

    def _get_name(self) -> str:  # what nn.Module's repr calls it; names of files in a feature cache depend on it
        return f"Frozen{super()._get_name()}"  # type: ignore[misc]  # of the class that it is mixed into


class CachedFrozen(Frozen):
    """Mixed into the class of a frozen module that keeps the features of images that come again."""

    memory: FeatureMemory | FeatureStore
    frozen_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Encode images, [B, ...], into features, [B, D], or recall what they were encoded into before."""
        encode: Callable[[Tensor], Tensor] = super().forward  # type: ignore[misc]  # of the class that it is mixed into
        # An attack needs the gradient, which no memory has.
        return encode(x) if x.requires_grad else _recall(self.memory, x, encode, self.frozen_dtype)


class FixedStatistics:
    """Mixed into the class of a network whose batch norm keeps the statistics that it has, and computes with them."""

    def train(self, mode: bool = True) -> Any:
        """Set the mode of all layers but batch norm."""
        super().train(mode)  # type: ignore[misc]  # of the class that it is mixed into
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


class FrozenPrefix:
    """Mixed into the class of a network whose stem and first stages are frozen, their activations remembered."""

    prefix: Prefix
    prefix_memory: FeatureMemory | FeatureStore | None
    frozen_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Encode images, [B, ...], into features, [B, D], from activations that are kept of those that come again."""
        encode: Callable[[Tensor], Tensor] = super().forward  # type: ignore[misc]  # of the class that it is mixed into
        if x.requires_grad or self.prefix_memory is None:
            return encode(x)
        rows = _recall(self.prefix_memory, x, lambda images: self.prefix.compute(images, encode), self.frozen_dtype)
        return self.prefix.go_on(rows, x, encode)


def _recall(
    memory: FeatureMemory | FeatureStore, x: Tensor, encode: Callable[[Tensor], Tensor], dtype: torch.dtype | None
) -> Tensor:
    """Recall or encode; in fewer bits where a type is given, and back in those of the images then."""
    if dtype is None:
        return memory.recall(x, encode)
    with torch.autocast(x.device.type, dtype):
        return memory.recall(x, encode).to(x.dtype)


def fix_statistics(module: nn.Module) -> nn.Module:
    """Have a network's batch norm stay in evaluation mode, in place; its weights are trained."""
    if not isinstance(module, FixedStatistics):
        _mix_in(FixedStatistics, module)
    return module.train(module.training)


def freeze_prefix(module: nn.Module, n_stages: int, input_shape: Sequence[int]) -> nn.Module:
    """Freeze a network's stem and first stages in place, and have it remember what they give.

    Args:
        module: A backbone; its stages are those of its `network`, or its own.
        n_stages: How many stages beside the stem.
        input_shape: (C, H, W) of an image.

    Raises:
        UsageError: It has fewer stages, or none that compute one after the other.
    """
    prefix = Prefix(getattr(module, "network", module), n_stages)
    _check_cut(module, prefix, torch.linspace(0, 1, 2 * math.prod(input_shape)).view(2, *input_shape))
    for part in prefix.modules:
        freeze(part)
    _mix_in(FrozenPrefix, module, rebuilt=(*getattr(module, "rebuilt", ()), "prefix", "prefix_memory", "frozen_dtype"))
    module.prefix = prefix  # type: ignore[assignment]
    module.prefix_memory = FeatureMemory(share_free_memory())  # type: ignore[assignment]
    return module


def _check_cut(module: nn.Module, prefix: Prefix, x: Tensor) -> None:
    """Refuse a network whose stages do not compute one after the other, and learn the shape of an activation."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            is_equal = torch.allclose(prefix.go_on(prefix.compute(x, module.forward), x, module.forward), module(x))
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UsageError(f"this backbone cannot be cut behind stage {len(prefix.stages)} ({reason})") from error
    finally:
        module.train(was_training)
    if not is_equal:
        raise UsageError(f"this backbone cannot be cut behind stage {len(prefix.stages)}: freeze all of it, or none")


def freeze(module: nn.Module) -> nn.Module:
    """Freeze a module in place: no gradients, and evaluation mode whatever `train()` is called above it."""
    if isinstance(module, FrozenPrefix):
        module.prefix_memory = None  # whoever remembers the features asks for no activation twice
    module.requires_grad_(False)
    module.eval()
    if not isinstance(module, Frozen):
        _mix_in(Frozen, module)
    return module


def remember(module: nn.Module, memory: FeatureMemory | FeatureStore) -> nn.Module:
    """Freeze a module in place and have it keep its features of images, so that none that comes again is encoded again.

    Args:
        module: Maps images, [B, ...], to features, [B, D], each by itself.
        memory: Where they are kept; it replaces the one that the module has, if any.
    """
    freeze(module)
    if not isinstance(module, CachedFrozen):
        _mix_in(CachedFrozen, module, rebuilt=(*getattr(module, "rebuilt", ()), "memory", "frozen_dtype"))
    module.memory = memory  # type: ignore[assignment]
    return module


class Frost:
    """A backbone that is frozen for a while.

    Args:
        backbone: Frozen in place, until `thaw`.
        freeze: Does it.
    """

    def __init__(self, backbone: nn.Module, freeze: Callable[[nn.Module], nn.Module]) -> None:
        self.backbone = backbone
        self._kinds = {module: type(module) for module in backbone.modules()}
        self._memories = {m: m.prefix_memory for m in backbone.modules() if isinstance(m, FrozenPrefix)}
        self._trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        freeze(backbone)

    def thaw(self) -> None:
        """Let the backbone learn again, as far as it did before."""
        for module, kind in self._kinds.items():
            if type(module) is not kind and "memory" in vars(module):
                del module.memory
            module.__class__ = kind
        for prefixed, memory in self._memories.items():
            prefixed.prefix_memory = memory
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self.backbone.train()


def compute_frozen_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Have all that a model remembers be computed and kept in fewer bits; what is trained computes as before."""
    for module in model.modules():
        if isinstance(module, CachedFrozen | FrozenPrefix):
            module.frozen_dtype = dtype


def share_features(model: nn.Module, folder: Path, warn: Callable[[str], None]) -> None:
    """Have a model's frozen backbones keep their features on disk, for all jobs.

    Args:
        model: Any; every part that remembers its features is found.
        folder: Where the files are, one a backbone.
        warn: Called with a message where a file cannot be used.
    """
    for module in model.modules():
        if isinstance(module, CachedFrozen):
            module.memory = FeatureStore(folder / f"{name_backbone(module)}.sqlite", warn)
        if isinstance(module, FrozenPrefix):
            layers = [module.extra_repr(), *map(str, module.prefix.modules)]
            name = name_layers("\n".join(layers), module.prefix.get_state())
            module.prefix_memory = FeatureStore(folder / f"{name}.sqlite", warn)


def _mix_in(mixin: type, module: nn.Module, **attributes: Any) -> None:
    module.__class__ = type(type(module).__name__, (mixin, type(module)), attributes)
