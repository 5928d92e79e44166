"""Does a model know what it knows: calibration, and telling its own images from others by its scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

N_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: per bin of confidence, the means of confidence and accuracy, and how many examples.

    Means of an empty bin are 0.
    """

    confidence: list[float]
    accuracy: list[float]
    count: list[int]

    @property
    def ece(self) -> float:
        """Expected calibration error (Naeini et al., 2015; Guo et al., 2017, equation 3), as a fraction.

        Example:
            Four answers given with confidence 0.9, of which three are right.

            >>> round(Reliability([0.9], [0.75], [4]).ece, 3)
            0.15
        """
        total = sum(self.count)
        gaps = (abs(c - a) * n for c, a, n in zip(self.confidence, self.accuracy, self.count, strict=True))
        return sum(gaps) / total


def measure_reliability(logits: Tensor, y: Tensor, n_bins: int = N_BINS) -> Reliability:
    """Sort all examples into bins of equal width by the probability of their predicted class.

    Args:
        logits: Of all examples at once: means over batches of a binned quantity are another quantity, [N, K].
        y: Labels, [N].
        n_bins: Bin k holds confidences in (k / n_bins, (k + 1) / n_bins].
    """
    confidence, answer = F.softmax(logits.double(), dim=1).max(1)
    right = (answer == y).double()
    bins = ((confidence * n_bins).ceil().long() - 1).clamp(0, n_bins - 1)
    count = torch.bincount(bins, minlength=n_bins)
    sums = (torch.bincount(bins, weights=values, minlength=n_bins) for values in (confidence, right))
    means = [(total / count.clamp_min(1)).tolist() for total in sums]
    return Reliability(means[0], means[1], count.tolist())


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """Return the temperature T > 0 that minimises the cross-entropy of logits / T (Guo et al., 2017, section 4.2).

    The loss is convex in 1 / T, so that its derivative, mean(E_p[z] - z_y), has one sign change, found by bisection in
    log T between 1/1000 and 1000. A model that is right everywhere (or constant) has no minimum, and gets a bound.

    Example:
        Two examples of logit gap 2, of which every second is right at gap 0: halves want T large.

        >>> fit_temperature(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])) > 100
        True
    """
    logits = logits.double()
    own = logits.gather(1, y[:, None]).squeeze(1)
    low, high = -3.0, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        p = F.softmax(logits / 10**middle, dim=1)
        slope = ((p * logits).sum(1) - own).mean()  # of the loss, in 1 / T
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(10**low)


# --- detection ---------------------------------------------------------------------------------------------------


def score(logits: Tensor) -> dict[str, Tensor]:
    """Return scores that should be high for images of the model's own kind, by name, [N] each.

    "msp" is the largest probability (Hendrycks and Gimpel, 2017), "max_logit" the largest logit (Hendrycks et al.,
    2022), "energy" the log of the sum of exponentials (Liu et al., 2020).
    """
    logits = logits.double()
    return {
        "msp": F.log_softmax(logits, dim=1).amax(1),  # its logarithm: the same order, without ties at 1
        "max_logit": logits.amax(1),
        "energy": torch.logsumexp(logits, dim=1),
    }


def measure_auroc(known: Tensor, other: Tensor) -> float:
    """Return the probability that an own image scores higher than another one, ties counted half.

    Args:
        known: Scores of images of the model's own kind, [N].
        other: Scores of others, [M].

    Example:
        >>> measure_auroc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    ordered = other.sort().values
    below = torch.searchsorted(ordered, known, right=False)
    not_above = torch.searchsorted(ordered, known, right=True)
    return float((below + not_above).double().mean() / (2 * len(other)))


def measure_fpr95(known: Tensor, other: Tensor) -> float:
    """Return the share of other images that pass for own ones where at least 95 % of the own ones pass.

    The own kind is the positive class. An image passes if its score is at least the threshold, which is the highest
    that lets 95 % of the own ones pass.

    Example:
        >>> measure_fpr95(torch.arange(1.0, 21.0), torch.tensor([1.5, 2.0, 30.0, 0.0]))
        0.5
    """
    ordered = known.sort(descending=True).values
    threshold = ordered[-(-95 * len(ordered) // 100) - 1]
    return float((other >= threshold).double().mean())
