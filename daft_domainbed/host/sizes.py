"""How large a network is: its parameters, and the multiply-adds of one image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from daft_domainbed.host.contract import Host, find_host, get_algorithm_class
from daft_domainbed.methods import find_method
from daft_domainbed.runtime.randomness import preserve_states


def measure_network(
    host: Host, algorithm: str, hparams: Mapping[str, Any], input_shape: Sequence[int], num_classes: int
) -> dict[str, int]:
    """Return the size of the network that answers, without its weights; nothing where it cannot be built so.

    Args:
        host: Registered.
        algorithm: Whose network it is.
        hparams: All of its run's.
        input_shape: (C, H, W).
        num_classes: As many logits it has.

    Returns:
        `parameters`, and `multiply_adds` of one image: those of convolutions and matrix products.
    """
    own = {**hparams, "weights": "none"} | ({"backbone_frozen": False} if "backbone_frozen" in hparams else {})
    return dict(_measure(host.name, algorithm, json.dumps(own, sort_keys=True), tuple(input_shape), num_classes))


@lru_cache(maxsize=256)
def _measure(
    host_name: str, algorithm: str, hparams: str, input_shape: tuple[int, ...], num_classes: int
) -> Mapping[str, int]:
    from torch.utils.flop_counter import FlopCounterMode

    host = find_host(host_name)
    # Most methods have ERM's network, and need no teacher to be built as that.
    kind = host.algorithms.ERM if find_method(algorithm).is_plain else None
    try:
        with torch.device("meta"), preserve_states(), torch.no_grad():
            model = (kind or get_algorithm_class(host, algorithm))(input_shape, num_classes, 1, json.loads(hparams))
            model.eval()
            with FlopCounterMode(display=False) as counter:
                model.predict(torch.zeros(1, *input_shape))
    except Exception:  # a method of the user's may need what is not there; its size is worth no failure
        return {}
    # Two floating-point operations are one multiply-add.
    return {"parameters": count_parameters(model), "multiply_adds": counter.get_total_flops() // 2}


def count_parameters(model: Any) -> int:
    """Return the number of parameters of the network that answers, each once."""
    return sum(parameter.numel() for parameter in getattr(model, "network", model).parameters())
