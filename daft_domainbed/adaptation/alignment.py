"""How far the features of a stream are from the source's: two Gaussians, and their divergence."""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY = 1280  # samples; the running Gaussian forgets at the rate of its inverse
SHRINKAGE = 30  # the largest entry of the source's covariance, divided by it, is added to both diagonals


def measure_divergence(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """Return KL(N || N') + KL(N' || N) of two Gaussians, in nats; the determinants cancel.

    Args:
        mean: [D].
        covariance: [D, D], positive definite.
        other_mean: [D].
        other_covariance: [D, D], positive definite.

    Raises:
        LinAlgError: A covariance is not positive definite.

    Example:
        Variances 1 and 4, means 0 and 2: (4 + 1/4 - 2 + 4 (1 + 1/4)) / 2.

        >>> one = torch.ones(1, 1)
        >>> measure_divergence(torch.zeros(1), one, torch.full((1,), 2.0), 4 * one).item()
        3.625
    """
    inverse, other_inverse = (torch.cholesky_inverse(torch.linalg.cholesky(c)) for c in (covariance, other_covariance))
    gap = mean - other_mean
    traces = (inverse * other_covariance).sum() + (other_inverse * covariance).sum() - 2 * len(mean)
    return 0.5 * (traces + gap @ (inverse + other_inverse) @ gap)


class RunningGaussian:
    """A Gaussian that follows the features of a stream.

    Args:
        source_mean: Of the Gaussian that it is compared with, [D].
        source_covariance: [D, D].
    """

    def __init__(self, source_mean: Tensor, source_covariance: Tensor) -> None:
        self.ridge = source_covariance.max() / SHRINKAGE * torch.eye(len(source_mean), device=source_mean.device)
        self.source_mean, self.source_covariance = source_mean, source_covariance + self.ridge
        self.mean, self.covariance = torch.zeros_like(source_mean), torch.zeros_like(source_covariance)
        self.n = 0

    def update(self, features: Tensor) -> Tensor:
        """Follow a batch of features, [B, D], and return the divergence, whose gradient goes through them alone."""
        self.n += len(features)
        rate = 1 / min(self.n, MEMORY)
        gaps = features - self.mean
        shift = rate * gaps.sum(0)
        mean = self.mean + shift
        spread = gaps.T @ gaps - len(features) * self.covariance
        covariance = self.covariance + rate * spread - torch.outer(shift, shift)
        self.mean, self.covariance = mean.detach(), covariance.detach()
        return measure_divergence(self.source_mean, self.source_covariance, mean, covariance + self.ridge)
