"""What an algorithm is made of beyond its state dict, so that a run goes on where it was, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# The module's own machinery, and what every start makes anew from the same arguments.
_REBUILT = frozenset(vars(nn.Module())) | {"hparams", "teacher"}


def capture(algorithm: nn.Module) -> dict[str, Any]:
    """Return an algorithm's weights, optimizers, generators and plain attributes, of plain types and tensors."""
    attributes = {}
    for prefix, module in algorithm.named_modules():
        for name, value in vars(module).items():
            if name not in _REBUILT and (packed := _pack(value)) is not None:
                attributes[f"{prefix}/{name}"] = packed
    return {"model": algorithm.state_dict(), "attributes": attributes}


def restore(algorithm: nn.Module, state: dict[str, Any]) -> None:
    """Put a captured state back into an algorithm that was built with the same arguments."""
    algorithm.load_state_dict(state["model"])
    modules = dict(algorithm.named_modules())
    for key, packed in state["attributes"].items():
        prefix, _, name = key.rpartition("/")
        module = modules[prefix]
        kind, content = packed
        if kind == "state_dict":
            getattr(module, name).load_state_dict(content)
        elif kind == "generator":
            getattr(module, name).set_state(content)
        else:
            object.__setattr__(module, name, content)


def _pack(value: Any) -> tuple[str, Any] | None:
    if isinstance(value, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler):
        return "state_dict", value.state_dict()
    if isinstance(value, torch.Generator):
        return "generator", value.get_state()
    return ("value", value) if _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str)
