"""What a classifier should say of images that show none of its classes, and the worst that it can be made to say."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.functional.attacks import Norm, run_pgd
from daft_domainbed.functional.input_spec import InputSpec


def measure_uniform_divergence(logits: Tensor) -> Tensor:
    """Return KL(u || softmax(logits)) of each row, [B], where u is uniform over the classes (RATIO, 2020).

    It is 0 for equal logits, and log K below the cross-entropy against u (outlier exposure's loss).

    Example:
        >>> measure_uniform_divergence(torch.tensor([[5.0, 5.0], [0.0, 100.0]]))
        tensor([ 0.0000, 49.3069])
    """
    return -F.log_softmax(logits, dim=1).mean(dim=1) - math.log(logits.shape[1])


def measure_log_confidence(logits: Tensor) -> Tensor:
    """Return the logarithm of the largest probability of each row, [B]."""
    return F.log_softmax(logits, dim=1).amax(dim=1)


def raise_confidence(
    predict: Callable[[Tensor], Tensor], x: Tensor, *, eps: float, norm: Norm, steps: int, spec: InputSpec
) -> Tensor:
    """Search each image's neighbourhood for where a classifier is surest of any class.

    The confidence there is what detection of out-distribution images has to withstand (RATIO's worst case, found there
    by APGD of 100 steps). An attack that ends lower than it began is given up: the image itself is answered.

    Args:
        predict: Maps inputs to logits, [B, K]; in evaluation mode.
        x: Inputs as the network takes them.
        eps: Radius in [0, 1] pixel units.
        norm: Of the ball.
        steps: Of projected gradient ascent.
        spec: How the inputs were normalised.

    Returns:
        Inputs, the shape of x, without gradient.
    """
    found = run_pgd(lambda z: measure_log_confidence(predict(z)).sum(), x, eps=eps, norm=norm, steps=steps, spec=spec)
    with torch.no_grad():
        is_better = measure_log_confidence(predict(found)) > measure_log_confidence(predict(x))
    return torch.where(is_better.view(-1, *[1] * (x.dim() - 1)), found, x.detach())
