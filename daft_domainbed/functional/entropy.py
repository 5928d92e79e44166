"""The entropy of a model's beliefs, and the scale of its logits that gives a wanted one."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

_FEWEST, _MOST = 1e-4, 1e4  # between which a scale is looked for
_HALVINGS = 60


def get_mean_entropy(logits: Tensor, temperature: float) -> float:
    """Return the mean entropy, in nats, of softmax(logits / temperature).

    Args:
        logits: Scores, [N, K].
        temperature: Above 0.

    Example:
        >>> import torch
        >>> round(get_mean_entropy(torch.zeros(3, 2), 4.0), 4)
        0.6931
    """
    log_beliefs = F.log_softmax(logits.double() / temperature, dim=1)
    return float(-(log_beliefs.exp() * log_beliefs).sum(dim=1).mean())


def find_matching_scale(logits: Tensor, temperature: float, entropy: float) -> float:
    """Return the s for which softmax(logits / (s temperature)) has a wanted mean entropy; bisection in log s.

    The entropy grows with s, from 0 to log K; what no s reaches gives the nearest of 1e-4 and 1e4.

    Args:
        logits: Scores, [N, K].
        temperature: Above 0.
        entropy: In nats.

    Example:
        Twice the logits have the same entropy at twice the temperature.

        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> round(find_matching_scale(2 * logits, 3.0, get_mean_entropy(logits, 3.0)), 6)
        2.0
    """
    low, high = math.log(_FEWEST), math.log(_MOST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if get_mean_entropy(logits, math.exp(middle) * temperature) < entropy:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
