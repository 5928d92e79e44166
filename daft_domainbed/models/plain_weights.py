"""The weights of a plain classifier, a backbone and a linear head, found in whatever wraps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daft_domainbed.errors import UsageError
from daft_domainbed.models.weights import check_values, load_nested

# Where training scripts put the weights beside their optimizer and the like; the first that is there counts.
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params")
_COUNTERS = ("num_batches_tracked", "n_averaged")
_COPIES = ("encoder_k.", "momentum_encoder.")  # MoCo's other network


@dataclass(frozen=True)
class PlainWeights:
    """A backbone's state dict, and the linear layer on its features.

    Attributes:
        backbone: By the names of the backbone's own layers.
        weight: [classes, features].
        bias: [classes].
    """

    backbone: dict[str, Tensor]
    weight: Tensor
    bias: Tensor


def read_plain_weights(path: Path, network: nn.Module, n_features: int, name: str) -> PlainWeights:
    """Find a backbone and its head in a file of weights.

    DataParallel ("module."), Lightning ("model.", "net.") and MoCo ("module.encoder_q.") put something before every
    name, training scripts put the state dict into another dictionary. Whatever else would take part in an answer is
    refused: it would be another one without.

    Args:
        path: Of a torch or safetensors file.
        network: The backbone, whose names are looked for.
        n_features: That it has for the head.
        name: The backbone's, for messages.

    Raises:
        UsageError: It is no state dict, lacks a layer of the backbone or has more than it and one head, or values that
            are no numbers; names what is wrong.
    """
    state = _unwrap(load_nested(path), path)
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith(_COUNTERS)}
    prefix = _find_prefix(state, list(wanted), path, name)
    backbone = {key: state[prefix + key] for key in network.state_dict() if prefix + key in state}
    for key, value in wanted.items():
        if backbone[key].shape != value.shape:
            raise UsageError(
                f"{path} does not fit backbone {name!r}: {prefix}{key} is {_show(backbone[key])} there and "
                f"{_show(value)} in the backbone"
            )
    weight, bias = _find_head(state, prefix, set(backbone), n_features, path)
    own = {"the head's weight": weight, "the head's bias": bias}
    check_values(backbone | own, wanted | dict.fromkeys(own, torch.zeros(0)), path)
    return PlainWeights(backbone, weight.float(), bias.float())


def _unwrap(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the first dictionary of tensors, at most three levels down."""
    if "model_dict" in content and "args" in content:
        raise UsageError(f"{path} is a checkpoint already: name it as the teacher, what it was trained on is in it")
    found: Any = content
    for _ in range(3):
        tensors = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
        inner = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None or len(tensors) > 2:
            break
        found = inner
    if not tensors:
        raise UsageError(f"{path} holds no weights: its keys are {', '.join(sorted(map(str, content))[:5]) or 'none'}")
    return tensors


def _find_prefix(state: Mapping[str, Tensor], wanted: list[str], path: Path, name: str) -> str:
    """Return what stands before every name of the backbone's layers."""
    candidates = sorted(
        {key.removesuffix(wanted[0]) for key in state if key == wanted[0] or key.endswith(f".{wanted[0]}")},
        key=lambda prefix: (prefix.endswith(_COPIES), len(prefix), prefix),
    )
    lacks = {prefix: [key for key in wanted if prefix + key not in state] for prefix in candidates}
    for prefix, lacking in lacks.items():
        if not lacking:
            return prefix
    lacking = min(lacks.values(), key=len, default=[])
    first = lacking[0] if lacking else wanted[0]
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    raise UsageError(
        f"{path} does not fit backbone {name!r}: it lacks {first}{more}; it has {', '.join(sorted(state)[:3])} ..."
    )


def _find_head(
    state: Mapping[str, Tensor], prefix: str, used: set[str], n_features: int, path: Path
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the only linear layer that is not the backbone's, and the only other thing."""
    taken = {prefix + key for key in used}
    left = {key: value for key, value in state.items() if key not in taken and not key.endswith(_COUNTERS)}
    left = {key: value for key, value in left.items() if not any(copy in key for copy in _COPIES)}
    left = {key: value for key, value in left.items() if not key.endswith(("queue", "queue_ptr"))}  # MoCo's, no layers
    heads = sorted(key for key, value in left.items() if key.endswith("weight") and value.ndim == 2)
    if len(heads) != 1:
        raise UsageError(
            f"{path} has {len(heads)} linear layers beside the backbone"
            + (f" ({', '.join(heads[:4])})" if heads else "")
            + ": adopt takes a backbone with one linear head for the classes"
        )
    weight = left[heads[0]]
    if weight.shape[1] != n_features:
        raise UsageError(
            f"{path}: the head {heads[0]} takes {weight.shape[1]} features, and the backbone has {n_features}"
        )
    name = heads[0].removesuffix("weight") + "bias"
    bias = left.get(name, torch.zeros(len(weight)))
    if bias.shape != weight.shape[:1]:
        raise UsageError(f"{path}: {name} is {_show(bias)}, and the head has {len(weight)} outputs")
    if more := sorted(left.keys() - {heads[0], name}):
        others = f" and {len(more) - 1} more" if len(more) > 1 else ""
        raise UsageError(
            f"{path} has {more[0]}{others} beside the backbone and its head {heads[0]}, without which it answers "
            "otherwise: adopt takes a backbone with one linear head for the classes"
        )
    return weight, bias


def _show(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
