"""Distributions of perturbations inside an Linf ball: samples, densities, and the search for a harmful one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.functional.input_spec import InputSpec

_TINY = 1e-8  # under logarithms and divisions, as ADT's authors have it


def sample_perturbation(mean: Tensor, spread: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Squash a normal sample into (-1, 1): a = tanh(mean + softplus(spread) noise) (ADT, Dong et al., 2020).

    Args:
        mean: Any shape.
        spread: The same shape; its softplus is the standard deviation before the squashing.
        noise: Standard normal, the same shape.

    Returns:
        The sample a and, of each entry, -log of its density without the constant log(2 pi) / 2; the latter's mean is
        the estimate of the entropy that ADT uses.

    Example:
        >>> a, surprise = sample_perturbation(torch.zeros(1), torch.zeros(1), torch.zeros(1))
        >>> round(a.item(), 4), round(surprise.item(), 4)  # log(log 2): the standard deviation is log 2
        (0.0, -0.3665)
    """
    deviation = F.softplus(spread)
    sample = torch.tanh(mean + deviation * noise)
    return sample, noise.square() / 2 + (deviation + _TINY).log() + (1 - sample.square() + _TINY).log()


def bound_negative_entropy(codes: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Return the mean of -log q(z | a) over codes z and batch, where q is normal (ADT's implicit family).

    Args:
        codes: What the perturbations were made from, [B, D].
        mean: What an encoder reads from the perturbations, [B, D].
        spread: The same shape; its softplus is the variance.

    Example:
        A code that is read exactly, with variance 1, leaves log(2 pi) / 2.

        >>> spread = torch.log(torch.e * torch.ones(1, 1) - 1)
        >>> round(bound_negative_entropy(torch.ones(1, 1), torch.ones(1, 1), spread).item(), 4)
        0.9189
    """
    variance = F.softplus(spread)
    distance = (codes - mean).square() / (2 * variance + _TINY)
    return (distance + (variance + _TINY).log() / 2).mean() + math.log(2 * math.pi) / 2


def place_perturbation(x: Tensor, unit: Tensor, eps: float, spec: InputSpec) -> Tensor:
    """Add a perturbation in [-1, 1] at the radius eps, in pixel units, and keep the pixels inside their box.

    Args:
        x: Inputs as the network takes them, [B, C, H, W].
        unit: The same shape; the gradient reaches it.
        eps: Linf radius.
        spec: How the inputs were normalised.
    """
    perturbed = x + eps * unit / spec.get_std(x)
    box = spec.get_box(x)
    return perturbed if box is None else torch.clamp(perturbed, *box)


def search_distribution(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    draw_noise: Callable[[], Tensor],
    *,
    eps: float,
    entropy_weight: float,
    steps: int,
    samples: int,
    rate: float,
    spec: InputSpec,
    spread: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Search, for each input, the distribution of perturbations that maximises expected loss plus entropy.

    Each step moves mean and spread by `rate` times their gradient over its own absolute value, entry by entry: Adam
    with both momenta at 0. ADT's code never clears the gradients between steps, so that each goes by their running
    sum; here each goes by its own.

    Args:
        loss: Maps inputs to a sum over samples.
        x: Inputs as the network takes them, [B, C, H, W].
        draw_noise: Returns standard normal noise, the shape of x.
        eps: Linf radius, in pixel units.
        entropy_weight: Of the entropy, a mean over an input's entries.
        steps: Of ascent.
        samples: Of the distribution, in each step.
        rate: Length of a step, before the squashing.
        spec: How the inputs were normalised.
        spread: Where the search begins; the mean begins at 0.

    Returns:
        Mean and spread, the shape of x, without gradient.
    """
    mean, spreads = torch.zeros_like(x), torch.full_like(x, spread)
    for _ in range(steps):
        mean.requires_grad_()
        spreads.requires_grad_()
        slopes = [torch.zeros_like(x), torch.zeros_like(x)]
        for _ in range(samples):
            with torch.enable_grad():
                unit, surprise = sample_perturbation(mean, spreads, draw_noise())
                entropy = surprise.flatten(1).mean(dim=1).sum()
                value = loss(place_perturbation(x, unit, eps, spec)) + entropy_weight * entropy
            for slope, part in zip(slopes, torch.autograd.grad(value, [mean, spreads]), strict=True):
                slope += part
        mean, spreads = (
            at.detach() + rate * slope / (slope.abs() + _TINY)
            for at, slope in zip((mean, spreads), slopes, strict=True)
        )
    return mean, spreads
