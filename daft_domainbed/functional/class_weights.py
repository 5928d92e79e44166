"""Weights of classes that a distributionally robust adversary chooses inside a ball around the uniform distribution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_HALVINGS = 64  # of an interval of hundreds: down to the last bit of a double


def get_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how far the best wrong class's probability exceeds the label's, [B], from -1 (sure and right) to 1.

    Example:
        >>> get_margins(torch.tensor([[0.0, 0.0], [50.0, 0.0]]), torch.tensor([0, 1]))
        tensor([0., 1.])
    """
    probabilities = F.softmax(logits, dim=1)
    of_label = F.one_hot(labels, logits.shape[1]).bool()
    return probabilities.masked_fill(of_label, -1.0).amax(dim=1) - probabilities[of_label]


def solve_kl_ball(gains: Tensor, radius: float) -> Tensor:
    """Return the distribution p that maximises sum_c p_c gains_c subject to KL(u || p) <= radius, u being uniform.

    The optimum is p_c ~ 1 / (nu - gains_c) with nu above the largest gain. The divergence falls with nu from infinity
    to 0, so that nu is one root on a line, which bisection finds (FAAL, Zhang et al., 2024, solves the same problem
    with a conic solver).

    Args:
        gains: What the adversary gains by each class's weight, [C]; only differences of gains matter.
        radius: In nats; at 0 p is uniform.

    Returns:
        p, [C], without gradient, of the type and on the device of the gains.

    Example:
        The constraint is met: KL(u || p) = -(log 0.4 + log 1.6) / 2 = 0.2231.

        >>> solve_kl_ball(torch.tensor([0.0, 1.0]), radius=0.22314355)
        tensor([0.2000, 0.8000])
    """
    exact = gains.detach().double().cpu()
    gaps = exact.max() - exact
    widest, size = float(gaps.max()), len(gaps)
    if radius == 0 or widest == 0:
        return torch.full_like(gains, 1 / size)
    log_gaps = (gaps / widest).log()

    # For p ~ 1 / (exp(t) + gap): at the upper end all ratios of weights are at most exp(radius), at the lower one the
    # class of the widest gap alone makes the divergence larger than the radius.
    low, high = -size * (radius + math.log(2)), -math.log(radius)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _measure_divergence(log_gaps, middle) > radius:
            low = middle
        else:
            high = middle
    return F.softmax(-_shift(log_gaps, high), dim=0).to(gains)


def _shift(log_gaps: Tensor, t: float) -> Tensor:
    """Return log(exp(t) + gap)."""
    return torch.logaddexp(log_gaps, torch.tensor(t, dtype=log_gaps.dtype))


def _measure_divergence(log_gaps: Tensor, t: float) -> float:
    """Return KL(u || p) for p ~ 1 / (exp(t) + gap)."""
    shifted = _shift(log_gaps, t)
    return float(shifted.mean() + torch.logsumexp(-shifted, dim=0) - math.log(len(shifted)))


def choose_sample_weights(margins: Tensor, labels: Tensor, radius: float, by: str = "mean") -> Tensor:
    """Return what each sample's loss is multiplied with, by the adversary's weight of its class.

    The adversary plays over the classes that the batch shows: an absent one, whose gain is nothing, would outweigh
    every class with negative margins. Uniform class weights give 1 to each sample, whatever the classes' shares.

    Args:
        margins: Each sample's margin, [B]; detached here.
        labels: Class indices, [B].
        radius: Of the KL ball.
        by: "mean", a class's gain is its mean margin; "sum", the sum of its margins, which favours frequent classes.

    Returns:
        C p_{y_i} for each sample, [B], where C is the number of classes present.
    """
    _, places, counts = labels.cpu().unique(return_inverse=True, return_counts=True)
    gains = torch.zeros(len(counts), dtype=torch.float64).index_add(0, places, margins.detach().double().cpu())
    if by == "mean":
        gains = gains / counts
    return (len(counts) * solve_kl_ball(gains, radius))[places].to(margins)
