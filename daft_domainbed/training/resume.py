"""What an algorithm is made of beyond its state dict, so that a run goes on where it was, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from daft_domainbed.teachers.teacher import Teacher

# The module's own machinery, and what every start makes anew from the same arguments.
_REBUILT = frozenset(vars(nn.Module())) | {"hparams"}


def capture(algorithm: nn.Module) -> dict[str, Any]:
    """Return an algorithm's weights, optimizers, generators and plain attributes, of plain types and tensors."""
    packed = {f"{prefix}/{name}": _pack(value) for prefix, name, value in _list_attributes(algorithm)}
    attributes = {key: value for key, value in packed.items() if value is not None}
    return {"model": algorithm.state_dict(), "attributes": attributes}


def list_unsaved(algorithm: nn.Module) -> list[str]:
    """Return the names of attributes that may change with every step and that `capture` cannot keep."""
    return [name for _, name, value in _list_attributes(algorithm) if _pack(value) is None and not _is_constant(value)]


def _is_teacher(value: Any) -> bool:
    """Return whether an attribute holds teachers alone, which every start finds anew."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return len(items) > 0 and all(isinstance(item, Teacher) for item in items)


def restore(algorithm: nn.Module, state: dict[str, Any]) -> None:
    """Put a captured state back into an algorithm that was built with the same arguments.

    What only an update makes, such as Fish's copy of itself, is left out: the next update makes it anew.
    """
    device = next((parameter.device for parameter in algorithm.parameters()), torch.device("cpu"))
    modules = dict(algorithm.named_modules(remove_duplicate=False))
    model = {key: value for key, value in state["model"].items() if key.rpartition(".")[0] in modules}
    for name, buffer in algorithm.named_buffers():
        if name in model:
            buffer.resize_(model[name].shape)  # GroupDRO's weights have none before its first update
    algorithm.load_state_dict(model)
    for key, (kind, content) in state["attributes"].items():
        prefix, _, name = key.rpartition("/")
        attributes: dict[str, Any] = modules[prefix].__dict__ if prefix in modules else {}
        if kind == "value":
            attributes[name] = _move(content, device)
        elif kind == "state_dict" and name in attributes:
            attributes[name].load_state_dict(content)
        elif kind == "generator" and name in attributes:
            attributes[name].set_state(content)


def _move(value: Any, device: torch.device) -> Any:
    """Move what was read on the CPU to where the algorithm computes."""
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_move(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _list_attributes(algorithm: nn.Module) -> Iterator[tuple[str, str, Any]]:
    for prefix, module in algorithm.named_modules():
        for name, value in vars(module).items():
            if name not in _REBUILT and name not in getattr(module, "rebuilt", ()) and not _is_teacher(value):
                yield prefix, name, value


def _pack(value: Any) -> tuple[str, Any] | None:
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict") and not isinstance(value, type):
        return "state_dict", value.state_dict()
    if isinstance(value, torch.Generator):
        return "generator", value.get_state()
    return ("value", value) if _is_plain(value) else None


def _is_constant(value: Any) -> bool:
    """Return whether no step can change a value: numbers, texts, functions, and what is made of them alone."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    if is_dataclass(value) and getattr(type(value), "__dataclass_params__").frozen:  # noqa: B009 - unknown to mypy
        return all(map(_is_constant, vars(value).values()))
    return value is None or isinstance(value, bool | int | float | str) or callable(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str)
