"""What adaptation knows of the source: prototypes, mean and covariance of features, from training domains alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.subject import Subject

LABELS = "true"  # whose labels group the features: the images' own; OWTTT's code takes the model's answers


@dataclass(frozen=True)
class SourceStatistics:
    """Statistics of a model's features on training domains' in-splits, not augmented.

    Attributes:
        prototypes: Normalised class means, [K, D]; zeros for a class that no training domain shows.
        mean: Of all features, [D].
        covariance: Of all features, [D, D], divided by their number.
    """

    prototypes: Tensor
    mean: Tensor
    covariance: Tensor


def summarise(features: Tensor, y: Tensor, n_classes: int) -> SourceStatistics:
    """Return the statistics of features, [N, D], of images of some classes, [N].

    Example:
        >>> found = summarise(torch.tensor([[3.0, 0.0], [5.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]), 2)
        >>> found.prototypes.tolist(), found.mean[1].item()
        ([[1.0, 0.0], [0.0, 1.0]], 0.6666666865348816)
    """
    exact = features.double()
    sums = torch.zeros(n_classes, exact.shape[1], dtype=torch.float64, device=exact.device).index_add_(0, y, exact)
    counts = torch.bincount(y, minlength=n_classes).clamp_min(1)[:, None]
    mean = exact.mean(0)
    centred = exact - mean
    covariance = centred.T @ centred / len(exact)
    return SourceStatistics(F.normalize(sums / counts).float(), mean.float(), covariance.float())


def measure_sources(subject: Subject) -> SourceStatistics:
    """Measure a model's source statistics.

    Raises:
        UsageError: The model does not answer by features, or held out every domain.
    """
    sources = [i for i in range(len(subject.environments)) if i not in subject.held_out]
    if not sources:
        raise UsageError(f"{subject.path} held out every domain: there is no source to take statistics from")
    features, labels = [], []
    with torch.no_grad():
        for i in sources:
            for batch in subject.list_batches(sorted(int(key) for key in subject.data.in_splits[i].keys)):
                x, y = subject.load(subject.environments[i], batch)
                encoded = subject.model.encode(x)
                if encoded is None:
                    raise UsageError(
                        f"{subject.path}: the answers of {subject.algorithm} do not rest on the features of a network "
                        "alone, which test, t3a and owttt need: --methods source bn tent"
                    )
                features.append(encoded)
                labels.append(y)
    return summarise(torch.cat(features), torch.cat(labels), subject.n_classes)
