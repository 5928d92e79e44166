"""How much of its teacher is in a student: answers, beliefs, and the geometry of features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 1024  # of a matrix of pairs at a time; bounds the memory


def measure_agreement(student: Tensor, teacher: Tensor) -> float:
    """Return the share of examples that both answer alike (Stanton et al., 2021), from logits, [N, K] each."""
    return float((student.argmax(1) == teacher.argmax(1)).double().mean())


def measure_kl(student: Tensor, teacher: Tensor) -> float:
    """Return the mean KL divergence from the teacher's to the student's belief, in nats, from logits, [N, K] each."""
    student, teacher = (F.log_softmax(logits.double(), dim=1) for logits in (student, teacher))
    return float(F.kl_div(student, teacher, reduction="batchmean", log_target=True))


def measure_cka(student: Tensor, teacher: Tensor) -> float:
    """Return the linear centred kernel alignment of two sets of features (Kornblith et al., 2019, equation 4).

    Args:
        student: Features, [N, D].
        teacher: Features of the same images, [N, E].

    Returns:
        1 where one is a rotated and scaled copy of the other; NaN where one is constant.
    """
    x, y = ((features - features.mean(0)).double() for features in (student, teacher))
    own = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).norm() ** 2 / own)


def measure_cosine_correlation(student: Tensor, teacher: Tensor) -> float:
    """Return the correlation, over all pairs of images, of the student's and the teacher's cosine similarity.

    Args:
        student: Features, [N, D], N at least 3.
        teacher: Features of the same images, [N, E].

    Returns:
        Pearson's correlation; 1 where the similarities are equal, NaN where one side's are all the same.
    """
    x, y = (F.normalize(features.double(), dim=1) for features in (student, teacher))
    sums = torch.zeros(6, dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _ROWS):
        pairs = torch.ones(len(x[start : start + _ROWS]), len(x), dtype=torch.bool, device=x.device).triu(start + 1)
        a, b = ((z[start : start + _ROWS] @ z.T)[pairs] for z in (x, y))
        sums += torch.stack([torch.ones_like(a).sum(), a.sum(), b.sum(), a @ a, b @ b, a @ b])
    n, a, b, aa, bb, ab = sums
    return float((ab - a * b / n) / ((aa - a * a / n) * (bb - b * b / n)).sqrt())
