"""The tokens of a vision transformer: what there is of an image before it becomes one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from daft_domainbed.functional.attacks import evaluating
from daft_domainbed.models.backbones import HeadlessBackbone


def has_tokens(featurizer: Any) -> bool:
    """Return whether a featurizer is one of timm's transformers whose answer is the class token."""
    if not isinstance(featurizer, HeadlessBackbone):
        return False
    network: Any = featurizer.network
    return getattr(network, "global_pool", "") == "token" and hasattr(network, "patch_embed")


def encode_tokens(featurizer: Any, x: Tensor) -> Tensor:
    """Return the tokens of images after the last norm, [B, 1 + N, D]; the first are the featurizer's features."""
    tokens: Tensor = featurizer.network.forward_features(featurizer.prepare(x))
    return tokens


def count_tokens(featurizer: Any, input_shape: Sequence[int]) -> int:
    """Return how many tokens an image of (C, H, W) becomes."""
    with evaluating(featurizer), torch.no_grad():
        return encode_tokens(featurizer, torch.zeros(1, *input_shape)).shape[1]
