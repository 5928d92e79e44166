"""Losses of adversarial training and of robust distillation, and the rules that balance two teachers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Return KL(softmax(p) || softmax(q)) of each row, [B]; the gradient reaches both.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.])
    """
    p, q = F.log_softmax(p_logits, dim=1), F.log_softmax(q_logits, dim=1)
    return (p.exp() * (p - q)).sum(dim=1)


def trades_loss(clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """TRADES (Zhang et al., 2019, equation 5): CE(f(x), y) + beta KL(f(x) || f(x')), as a batch mean.

    The divergence moves the clean answer as well as the adversarial one.

    Args:
        clean_logits: Scores of the images, [B, K].
        adversarial_logits: Scores of the same images under attack, [B, K].
        labels: Class indices, [B].
        beta: The weight of robustness, 1 / lambda in the paper.

    Example:
        >>> z = torch.zeros(1, 2)
        >>> trades_loss(z, z, torch.tensor([0]), beta=6.0).item() == torch.log(torch.tensor(2.0))
        tensor(True)
    """
    return F.cross_entropy(clean_logits, labels) + beta * kl_divergence(clean_logits, adversarial_logits).mean()


def measure_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of softmax(logits) in nats, averaged over the batch, a scalar.

    Example:
        >>> round(measure_entropy(torch.zeros(3, 2)).item(), 4)
        0.6931
    """
    return torch.special.entr(F.softmax(logits.float(), dim=1)).sum(dim=1).mean()


def balance_temperatures(
    temperatures: tuple[float, float],
    entropies: tuple[float, float],
    rate: float,
    limits: tuple[float, float] = (1.0, 10.0),
) -> tuple[float, float]:
    """Move two teachers' temperatures one step towards equal entropies (B-MTARD, Zhao et al., 2024).

    The teacher of the higher entropy is sharpened by `rate`, the other softened by it, both inside the limits.

    Example:
        >>> balance_temperatures((2.0, 2.0), entropies=(0.9, 0.1), rate=0.25)
        (1.75, 2.25)
    """
    low, high = limits
    first, second = temperatures
    step = rate * ((entropies[0] > entropies[1]) - (entropies[0] < entropies[1]))
    return min(max(first - step, low), high), min(max(second + step, low), high)


def balance_weights(weight: float, progress: tuple[float, float], rate: float, beta: float = 1.0) -> float:
    """Move the first of two losses' weights, which sum to 1, towards its share of what is left to learn (B-MTARD).

    Args:
        weight: The first loss's weight so far.
        progress: Each loss divided by its first value; the larger one fell less and gains weight.
        rate: The share of the way that is gone, from 0 to 1.
        beta: Sharpens the shares.

    Example:
        >>> balance_weights(0.5, progress=(0.9, 0.3), rate=0.5)
        0.625
    """
    first, second = (value**beta for value in progress)
    total = first + second
    share = first / total if total > 0 else 0.5  # both are learnt
    return (1 - rate) * weight + rate * share
