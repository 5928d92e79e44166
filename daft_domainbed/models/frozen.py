"""Frozen modules: no gradients, always in evaluation mode, and with a memory of their features where that is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from daft_domainbed.models.feature_memory import FeatureMemory
from daft_domainbed.models.feature_store import FeatureStore, name_backbone


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

    def forward(self, x: Tensor) -> Tensor:
        """Encode images, [B, ...], into features, [B, D], or recall what they were encoded into before."""
        encode: Callable[[Tensor], Tensor] = super().forward  # type: ignore[misc]  # of the class that it is mixed into
        # An attack needs the gradient, which no memory has.
        return encode(x) if x.requires_grad else self.memory.recall(x, encode)


def freeze(module: nn.Module) -> nn.Module:
    """Freeze a module in place: no gradients, and evaluation mode whatever `train()` is called above it."""
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
        _mix_in(CachedFrozen, module, rebuilt=(*getattr(module, "rebuilt", ()), "memory"))
    module.memory = memory  # type: ignore[assignment]
    return module


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


def _mix_in(mixin: type, module: nn.Module, **attributes: Any) -> None:
    module.__class__ = type(type(module).__name__, (mixin, type(module)), attributes)
