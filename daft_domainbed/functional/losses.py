"""Losses as pure functions of logits; every one returns the batch mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy against a target distribution.

    Args:
        logits: Pre-softmax scores, [B, K].
        targets: Probabilities, [B, K]; a row sums to 1.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]])).item() == torch.log(torch.tensor(2.0))
        tensor(True)
    """
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL divergence from the softened teacher to the softened student (Hinton et al., 2015).

    Scaled by temperature**2, so that its gradient keeps the size of the hard-label loss's.

    Args:
        student_logits: Pre-softmax scores, [B, K].
        teacher_logits: The same shape; detached here, so the teacher never gets a gradient.
        temperature: 1.0 is plain KL; larger softens both sides.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(kd_loss(-z, z, temperature=1.0).item(), 4)
        1.5232
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def mix_targets(labels: Tensor, teacher_logits: Tensor, mix: float, temperature: float) -> Tensor:
    """Blend one-hot labels with a teacher's softened beliefs: (1 - mix) onehot + mix softmax(logits / temperature).

    Args:
        labels: Class indices, [B].
        teacher_logits: Scores of the model before adversarial fine-tuning, [B, K].
        mix: 0 is the one-hot target of standard adversarial training, 1 the teacher's alone.
        temperature: Softens the teacher.

    Returns:
        Target distributions, [B, K], without gradient.

    Example:
        >>> mix_targets(torch.tensor([0]), torch.zeros(1, 2), mix=0.5, temperature=1.0)
        tensor([[0.7500, 0.2500]])
    """
    one_hot = F.one_hot(labels, teacher_logits.shape[1]).to(teacher_logits.dtype)
    return (1 - mix) * one_hot + mix * F.softmax(teacher_logits.detach() / temperature, dim=1)


def worst_case_linear_loss(logits: Tensor, weight: Tensor, targets: Tensor, eps: float | Tensor) -> Tensor:
    """Bound the loss of a linear head over an L2 ball in feature space, in closed form.

    For target class k every rival j gains at most eps * |w_j - w_k|, so the loss for k is the cross-entropy of the
    logits raised by that much. Exact for two classes, an upper bound for more (one delta cannot serve every rival).
    A soft target averages the bounds of its classes.

    Args:
        logits: The head's scores at the unperturbed features, [B, K].
        weight: The head's weight, [K, D].
        targets: Probabilities, [B, K].
        eps: Radius in units of the features, a scalar.

    Example:
        Two classes, w_0 - w_1 of norm 1: a radius of 1 takes the margin from 1 to 0, whose loss is log 2.

        >>> w = torch.tensor([[0.5], [-0.5]])
        >>> loss = worst_case_linear_loss(torch.tensor([[0.5, -0.5]]), w, torch.tensor([[1.0, 0.0]]), 1.0)
        >>> round(loss.item(), 4)
        0.6931
    """
    gap = _pairwise_distances(weight)
    # Row k of `raised` holds the logits as the adversary of target class k would have them.
    raised = logits.unsqueeze(1) + eps * gap
    losses = torch.logsumexp(raised, dim=2) - logits
    return (targets * losses).sum(dim=1).mean()


def _pairwise_distances(weight: Tensor) -> Tensor:
    """Return |w_k - w_j| for all pairs of rows, [K, K], with a zero gradient (not NaN) where rows coincide."""
    squares = (weight.unsqueeze(1) - weight.unsqueeze(0)).square().sum(dim=2)
    same = squares == 0
    return torch.where(same, torch.zeros_like(squares), torch.where(same, torch.ones_like(squares), squares).sqrt())
